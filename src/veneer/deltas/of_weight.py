"""A module that runs on changed parameters, swapped in for the call and gone after it.

    Param        w ← w + δ                 for any named parameter (norm tuning, partial and full tuning)
    OfWeight     W ← f(W)                  a function of the weight (HiRA, shared-bank methods)
    Sparse       W ← W + ΔW                ΔW zero but for chosen entries: y += x ΔWᵀ
    Replace      w ← v                     parameters of the adapter's own: a task's head; shapes may differ

Exact, and each merges by definition. The changed weight lives for the call alone; what is stored per adapter is δ, the
entries, or what f closes over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.deltas.base import Delta, widest


@dataclass(frozen=True, eq=False)
class Param(Delta):
    """The module runs on ``w + δ`` for each named parameter."""

    deltas: Mapping[str, Tensor]

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The sums, rounded once to the parameters' dtypes."""
        return {name: (parameters[name] + delta).to(parameters[name].dtype) for name, delta in self.deltas.items()}

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums."""
        merged = {}
        for name, delta in self.deltas.items():
            w, d = widest(parameters[name], delta)
            merged[name] = (w + d).to(parameters[name].dtype)
        return merged

    @property
    def nbytes(self) -> int:
        """Bytes of the δ."""
        return sum(delta.nbytes for delta in self.deltas.values())


@dataclass(frozen=True, eq=False)
class OfWeight(Delta):
    """The module runs on ``f(W)``; ``held`` are the bytes f closes over."""

    f: Callable[[Tensor], Tensor]
    held: int = 0

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """f of the weight."""
        weight = parameters["weight"]
        return {"weight": self.f(weight).to(weight.dtype)}

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """f of the weight, computed wide."""
        (weight,) = widest(parameters["weight"])
        return {"weight": self.f(weight).detach().to(parameters["weight"].dtype)}

    @property
    def nbytes(self) -> int:
        """Bytes f closes over."""
        return self.held


@dataclass(frozen=True, eq=False)
class Sparse(Delta):
    """``W[rows, columns] += values``.

    Args:
        rows: ``[nnz]``, int, output features.
        columns: ``[nnz]``, int, input features.
        values: ``[nnz]``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weight with the entries added."""
        weight = parameters["weight"]
        return {"weight": self._added(weight)}

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, computed wide."""
        (weight,) = widest(parameters["weight"])
        return {"weight": self._added(weight).detach().to(parameters["weight"].dtype)}

    def _added(self, weight: Tensor) -> Tensor:
        index = (self.rows.long(), self.columns.long())
        return weight.index_put(index, self.values.to(weight.dtype), accumulate=True)

    @property
    def flops_per_token(self) -> int:
        """A multiply-add an entry, if it were run apart."""
        return 2 * self.values.numel()


@dataclass(frozen=True, eq=False)
class Replace(Delta):
    """The module runs on ``values`` (by parameter name) in place of its own parameters."""

    values: Mapping[str, Tensor]

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values, in the dtypes of the parameters whose place they take."""
        return {name: value.to(parameters[name].dtype) for name, value in self.values.items()}

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values themselves."""
        return {name: value.detach().to(parameters[name].dtype).clone() for name, value in self.values.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(value.nbytes for value in self.values.values())
