"""A low-rank change of a linear map.

    y  ←  y + s · (x Aᵀ) Bᵀ          A ∈ R^{r×in},  B ∈ R^{out×r}

which merges as ``W ← W + s · B A``. The bias is untouched. Dropout, when asked for, acts on the input of ``A``
only, as in LoRA (Hu et al. 2021, §4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """``y += scale · (dropout(x) Aᵀ) Bᵀ``.

    Args:
        A: ``[r, in]``.
        B: ``[out, r]``.
        scale: the factor s.
        dropout: probability with which an input feature is zeroed, the rest scaled up; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change. The products run in the dtype of ``x``; A and B may be kept in a wider one."""
        if self.dropout:
            x = F.dropout(x, self.dropout)
        # The scale goes onto [.., r], which is far smaller than [.., out].
        inner = F.linear(x, self.A.to(x.dtype)) * self.scale
        return y + F.linear(inner, self.B.to(x.dtype))

    def merge_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W + s B A}``, for a weight stored ``[out, in]``."""
        weight = parameters["weight"]
        dtype = torch.promote_types(torch.promote_types(weight.dtype, self.A.dtype), torch.float32)
        change = self.scale * (self.B.to(dtype) @ self.A.to(dtype))
        return {"weight": (weight.to(dtype) + change.to(weight.device)).to(weight.dtype)}

    @property
    def nbytes(self) -> int:
        """Bytes of A and B."""
        return self.A.nbytes + self.B.nbytes

    @property
    def flops_per_token(self) -> int:
        """``2 r (in + out)``."""
        return 2 * (self.A.numel() + self.B.numel())
