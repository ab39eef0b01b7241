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

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class Rotate(Delta):
    """Rotate the input by blocks ``R`` ``[k, b, b]``, in = k · b."""

    R: Tensor

    def before(self, x: Tensor) -> Tensor:
        """Rotate, as ``x + x (R − I)``: near the identity bf16 would keep three digits of R, but as many of R − I."""
        k, b, _ = self.R.shape
        identity = torch.eye(b, dtype=self.R.dtype, device=self.R.device)
        blocks = x.reshape(-1, k, b).transpose(0, 1)
        return torch.baddbmm(blocks, blocks, (self.R - identity).to(x.dtype)).transpose(0, 1).reshape(x.shape)

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W blockdiag(R)ᵀ}``."""
        weight = parameters["weight"]
        dtype = torch.promote_types(weight.dtype, self.R.dtype)
        blocks = weight.to(dtype).unflatten(-1, self.R.shape[:2])
        return {"weight": torch.einsum("...kb,kcb->...kc", blocks, self.R.to(dtype)).flatten(-2)}

    @property
    def flops_per_token(self) -> int:
        """``2 · in · b``."""
        return 2 * self.R.numel()
