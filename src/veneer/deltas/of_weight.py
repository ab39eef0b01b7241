"""A module that runs on changed parameters, swapped in for the call and gone after it.

    Param        w ← w + δ                 for any named parameter (norm tuning, partial and full tuning)
    OfWeight     W ← f(W)                  a function of the weight (HiRA, shared-bank methods)
    Sparse       W ← W + ΔW                ΔW zero but for chosen entries: y += x ΔWᵀ
    Replace      w ← v                     parameters of the adapter's own: a task's head; shapes may differ
    AtParameter  p ← δ's change of p       p a linear map kept as a bare parameter: experts, XLNet's attention

Exact, and each merges by definition. The changed weight lives for the call alone; what is stored per adapter is δ, the
entries, or what f closes over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.deltas.base import Delta


class Swapped(Delta):
    """Any form that acts by the module's running on what `changed` gives."""

    def effective(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The changed parameters, rounded once to the dtypes of those whose place they take."""
        return {name: value.to(parameters[name].dtype) for name, value in self.changed(parameters).items()}


@dataclass(frozen=True, eq=False)
class Param(Swapped):
    """The module runs on ``w + δ`` for each named parameter."""

    deltas: Mapping[str, Tensor]

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums."""
        return {name: parameters[name] + delta for name, delta in self.deltas.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the δ."""
        return sum(delta.nbytes for delta in self.deltas.values())


@dataclass(frozen=True, eq=False)
class OfWeight(Swapped):
    """The module runs on ``f(W)``; ``held`` are the bytes f closes over."""

    f: Callable[[Tensor], Tensor]
    held: int = 0

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """f of the weight."""
        return {"weight": self.f(parameters["weight"])}

    @property
    def nbytes(self) -> int:
        """Bytes f closes over."""
        return self.held


@dataclass(frozen=True, eq=False)
class Sparse(Swapped):
    """``W[rows, columns] += values``.

    Args:
        rows: ``[nnz]``, int, output features.
        columns: ``[nnz]``, int, input features.
        values: ``[nnz]``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with the entries added."""
        weight, index = parameters["weight"], (self.rows.long(), self.columns.long())
        return {"weight": weight.index_put(index, self.values.to(weight.dtype), accumulate=True)}

    @property
    def flops_per_token(self) -> int:
        """A multiply-add an entry, if it were run apart."""
        return 2 * self.values.numel()


@dataclass(frozen=True, eq=False)
class Replace(Swapped):
    """The module runs on ``values`` (by parameter name) in place of its own parameters."""

    values: Mapping[str, Tensor]

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values themselves."""
        return dict(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(value.nbytes for value in self.values.values())


@dataclass(frozen=True, eq=False)
class AtParameter(Swapped):
    """``delta`` acts on a linear map that the module keeps as a parameter called ``name``.

    Args:
        name: of the parameter.
        delta: any form that merges into a weight.
        weight: the parameter's value as the weight ``[…, out, in]`` the delta knows.
        stored: such a weight, and the parameter whose place it takes -> its value as the module stores it.
    """

    name: str
    delta: Delta
    weight: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, Tensor], Tensor]

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameter with the delta's change."""
        own = parameters[self.name]
        return {self.name: self.stored(self.delta.changed({"weight": self.weight(own)})["weight"], own)}

    @property
    def nbytes(self) -> int:
        """Of the delta."""
        return self.delta.nbytes

    @property
    def flops_per_token(self) -> int:
        """Of the delta, were it run apart."""
        return self.delta.flops_per_token
