"""Scaling and shifting features.

output side    y ← v ⊙ y                 scales the bias, too (IA3, Liu et al. 2022, §3.3)
               y ← v ⊙ (y − b) + b        leaves the bias b as it is (DoRA's magnitude, Liu et al. 2024, §4)
input side     x ← v ⊙ x
bias           y ← y + b
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from veneer.deltas.base import Delta, per_row
from veneer.errors import AdapterError
from veneer.kernels.scaled import scaled


@dataclass(frozen=True, eq=False)
class Scale(Delta):
    """Scale the output by ``v`` ``[out]``; ``bias`` is the module's, if it is to stay unscaled."""

    v: Tensor
    bias: Tensor | None = None

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Scale."""
        return scaled(y, self.v, self.bias)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": diag(v) W, "bias": v ⊙ b}``, the bias only if it is scaled."""
        weight = parameters["weight"]
        new = {"weight": weight * self.v.view(-1, *[1] * (weight.dim() - 1))}
        if "bias" in parameters and self.bias is None:
            new["bias"] = parameters["bias"] * self.v
        return new

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """Gathered scales."""
        if any(delta.bias is not None for delta in deltas):
            return None
        return _ScaleRows([delta.v for delta in deltas], which)

    @property
    def flops_per_token(self) -> int:
        """One product a feature."""
        return self.v.numel()


@dataclass(frozen=True, eq=False)
class InputScale(Delta):
    """Scale the input by ``v`` ``[in]``."""

    v: Tensor

    def before(self, x: Tensor) -> Tensor:
        """Scale."""
        return scaled(x, self.v)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W diag(v)}``."""
        return {"weight": parameters["weight"] * self.v}

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """Gathered scales."""
        return _InputScaleRows([delta.v for delta in deltas], which)

    @property
    def flops_per_token(self) -> int:
        """One product a feature."""
        return self.v.numel()


@dataclass(frozen=True, eq=False)
class Bias(Delta):
    """Add ``b`` ``[out]`` to the output."""

    b: Tensor

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add."""
        return y + self.b.to(y.dtype)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"bias": bias + b}``.

        Raises:
            AdapterError: the module has no bias to add it to.
        """
        if "bias" not in parameters:
            raise AdapterError("A bias cannot be merged into a module that has none.")
        return {"bias": parameters["bias"] + self.b}

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """Gathered biases."""
        return _BiasRows([delta.b for delta in deltas], which)

    @property
    def flops_per_token(self) -> int:
        """One sum a feature."""
        return self.b.numel()


@dataclass(frozen=True, eq=False)
class _ScaleRows(Delta):
    v: Sequence[Tensor]
    which: Tensor

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * per_row(self.v, self.which, y.dim())).to(y.dtype)


@dataclass(frozen=True, eq=False)
class _InputScaleRows(Delta):
    v: Sequence[Tensor]
    which: Tensor

    def before(self, x: Tensor) -> Tensor:
        return (x * per_row(self.v, self.which, x.dim())).to(x.dtype)


@dataclass(frozen=True, eq=False)
class _BiasRows(Delta):
    b: Sequence[Tensor]
    which: Tensor

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        return y + per_row(self.b, self.which, y.dim()).to(y.dtype)
