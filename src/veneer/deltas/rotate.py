"""A rotation of the input in blocks.

    x  ←  x · blockdiag(R_1 … R_k)          R_i ∈ R^{b×b} orthogonal

which merges as ``W ← W blockdiag(R)ᵀ``: angles between the rows of W blocks stay (OFT, Qiu et al. 2023, §3).
The bias is untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.base import Delta, widest


@dataclass(frozen=True, eq=False)
class Rotate(Delta):
    """Rotate the input by blocks ``R`` ``[k, b, b]``, in = k · b."""

    R: Tensor

    def before(self, x: Tensor) -> Tensor:
        """Rotate."""
        return self._rotated(x, self.R.to(x.dtype))

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W blockdiag(R)ᵀ}``."""
        weight, rotation = widest(parameters["weight"], self.R)
        return {"weight": self._rotated(weight, rotation.mT).to(parameters["weight"].dtype)}

    @property
    def flops_per_token(self) -> int:
        """``2 · in · b``."""
        return 2 * self.R.numel()

    @staticmethod
    def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
        blocks = x.unflatten(-1, rotation.shape[:2])
        return torch.einsum("...kb,kbc->...kc", blocks, rotation).flatten(-2)
