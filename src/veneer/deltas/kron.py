"""A Kronecker product as the change of a linear map.

    y  ←  y + s · x (C ⊗ M)ᵀ          C ∈ R^{o₁×i₁},  M ∈ R^{o₂×i₂},  out = o₁o₂,  in = i₁i₂

With x seen as an i₁ × i₂ matrix this is ``C X Mᵀ``: two small products, the smaller factor first; C ⊗ M is never
formed. M may itself be a product ``B A`` (LoKr, Yeh et al. 2023, §3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class Kron(Delta):
    """``y += scale · x (C ⊗ M)ᵀ`` with M the product of ``factors``, left to right.

    Args:
        C: ``[o1, i1]``.
        factors: ``(M,)`` with M ``[o2, i2]``, or ``(B, A)`` with B ``[o2, r]``, A ``[r, i2]``.
        scale: the factor s.
    """

    C: Tensor
    factors: tuple[Tensor, ...]
    scale: float

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change."""
        inner = x.unflatten(-1, (self.C.shape[1], -1))
        inner = torch.einsum("oi,...ij->...oj", self.C.to(x.dtype) * self.scale, inner)
        for factor in reversed(self.factors):
            inner = inner @ factor.to(x.dtype).mT
        return y + inner.flatten(-2)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W + s C ⊗ M}``."""
        m = self.factors[0] if len(self.factors) == 1 else self.factors[0] @ self.factors[1]
        return {"weight": parameters["weight"] + self.scale * torch.kron(self.C, m)}

    @property
    def nbytes(self) -> int:
        """Bytes of C and the factors."""
        return self.C.nbytes + sum(factor.nbytes for factor in self.factors)

    @property
    def flops_per_token(self) -> int:
        """Both products."""
        o1, i1 = self.C.shape
        return 2 * o1 * i1 * self.factors[-1].shape[1] + 2 * o1 * sum(factor.numel() for factor in self.factors)
