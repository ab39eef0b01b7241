"""A low-rank change of a linear map.

    y  ←  y + s · (x Aᵀ) Bᵀ          A ∈ R^{r×in},  B ∈ R^{out×r}

which merges as ``W ← W + s · B A``. The bias is untouched. Dropout, when asked for, acts on the input of ``A``
only, as in LoRA (Hu et al. 2021, §4.1). An embedding is the linear map of a one-hot input, a convolution that of
its patches: for them A is a table, or a kernel of r channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta
from veneer.kernels.frozen import frozen_linear
from veneer.kernels.low_rank import add_low_rank, low_rank_linears


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """``y += scale · (dropout(x) Aᵀ) Bᵀ``.

    Args:
        A: ``[r, in]``; of a stack of maps, which only `changed` knows, ``[maps, r, in]``.
        B: ``[out, r]``, or ``[maps, out, r]``.
        scale: the factor s.
        dropout: probability with which an input feature is zeroed, the rest scaled up; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change. The products run in the dtype of ``y``; A and B may be kept in a wider one."""
        if self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        return add_low_rank(x, y, self.A, self.B, self.scale)

    @classmethod
    def linears(
        cls, deltas: Sequence[Self], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Sequence[Tensor] | None:
        """All gradients of x in one sum."""
        if cls is not LowRank or any(delta.dropout for delta in deltas):
            return None
        factors = [delta.A for delta in deltas], [delta.B for delta in deltas], [delta.scale for delta in deltas]
        return low_rank_linears(x, weights, biases, *factors)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W + s B A}``."""
        weight = parameters["weight"]
        return {"weight": weight + self.scale * self._product(weight)}

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """Batched products over A and B of each row, ranks padded with zeros, scales folded into B."""
        if cls is not LowRank or any(delta.dropout for delta in deltas):
            return None
        rank = max(len(delta.A) for delta in deltas)
        a = torch.stack([F.pad(delta.A, (0, 0, 0, rank - len(delta.A))) for delta in deltas])
        b = torch.stack([F.pad(delta.B * delta.scale, (0, rank - delta.B.shape[1])) for delta in deltas])
        return LowRankRows(a[which], b[which])

    @property
    def flops_per_token(self) -> int:
        """``2 r (in + out)``."""
        return 2 * (self.A.numel() + self.B.numel())

    def _product(self, weight: Tensor) -> Tensor:
        """B A, in the shape of the weight."""
        return self.B @ self.A


@dataclass(frozen=True, eq=False)
class ScaledLowRank(Delta):
    """``y += (((x Aᵀ) ⊙ d) Bᵀ) ⊙ b``: what `folded` does, where only d and b are learned and A and B are not.

    Args:
        A: ``[r, in]``.
        B: ``[out, r]``.
        d: ``[r]``.
        b: ``[out]``.
    """

    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor

    @property
    def folded(self) -> LowRank:
        """The scales in the factors."""
        return LowRank(self.d[:, None] * self.A, self.b[:, None] * self.B, 1.0)

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change, without the products that gradients of the factors would take."""
        a, b, d, outer = (each.to(y.dtype) for each in (self.A, self.B, self.d, self.b))
        return torch.addcmul(y, frozen_linear(frozen_linear(x, a, None) * d, b, None), outer)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `folded`."""
        return self.folded.changed(parameters)

    @classmethod
    def mixed(cls, deltas: Sequence[Self], which: Tensor) -> Delta | None:
        """As `LowRank`'s."""
        return LowRank.mixed([delta.folded for delta in deltas], which)

    @property
    def flops_per_token(self) -> int:
        """``2 r (in + out)``, and the scales."""
        return 2 * (self.A.numel() + self.B.numel()) + len(self.d) + len(self.b)


@dataclass(frozen=True, eq=False)
class LowRankRows(Delta):
    """``LowRank`` with factors of their own for each row: A ``[rows, r, in]``, B ``[rows, out, r]``, scale in B."""

    A: Tensor
    B: Tensor

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add each row's change; ``x`` is ``[rows, ..., in]``."""
        flat = x.reshape(len(x), -1, x.shape[-1])
        change = flat @ self.A.to(x.dtype).mT @ self.B.to(x.dtype).mT
        return y + change.view_as(y)


@dataclass(frozen=True, eq=False)
class EmbeddingLowRank(LowRank):
    """`LowRank` of an embedding: A ``[r, vocabulary]``, B ``[width, r]``; x are ids."""

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change."""
        inner = F.embedding(x, self.A.mT.to(y.dtype)) * self.scale
        return y + F.linear(inner, self.B.to(y.dtype))

    def _product(self, weight: Tensor) -> Tensor:
        return (self.B @ self.A).mT


@dataclass(frozen=True, eq=False)
class ConvLowRank(LowRank):
    """`LowRank` of a convolution: A ``[r, in, *kernel]`` with the module's own stride, B ``[out, r, 1…]``.

    Args:
        convolve: the module's convolution (stride, padding, dilation bound), called with input and kernel.
    """

    convolve: Any = field(default=None)

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change."""
        if self.dropout:
            x = F.dropout(x, self.dropout)
        inner = self.convolve(x, self.A.to(y.dtype)) * self.scale
        return y + torch.einsum("or,nr...->no...", self.B.flatten(1).to(y.dtype), inner)

    def _product(self, weight: Tensor) -> Tensor:
        return (self.B.flatten(1) @ self.A.flatten(1)).view_as(weight)
