"""A rotation of the input, in blocks, or as a product of such with the blocks spread ever wider.

    x  ←  x · B_m … B_1,     B_i = P_i blockdiag(R_i1 … R_ik) P_iᵀ          R_ij ∈ R^{b×b} orthogonal

which merges as ``W ← W (B_m … B_1)ᵀ``: angles between the rows of W blocks stay (OFT, Qiu et al. 2023, §3: m = 1,
P = I). P_i brings halves of blocks together that are 2^{i−1} halves apart: after m factors every feature depends on
b·2^{m−1} (butterfly factors, Liu et al. 2024, BOFT, §4). The bias is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.base import Delta


@dataclass(frozen=True, eq=False)
class Rotate(Delta):
    """Rotate the input.

    Args:
        R: ``[k, b, b]``, in = k · b, or ``[m, k, b, b]``: the first factor acts last. Of m factors b is even and
            b · 2^(m − 1) divides in.
    """

    R: Tensor

    def before(self, x: Tensor) -> Tensor:
        """Rotate, as ``x + x (R − I)``: near the identity bf16 would keep three digits of R, but as many of R − I."""
        for step, blocks in reversed(list(self._factors())):
            k, b, _ = blocks.shape
            identity = torch.eye(b, dtype=blocks.dtype, device=blocks.device)
            rows = _gathered(x, step, b).reshape(-1, k, b).transpose(0, 1)
            rows = torch.baddbmm(rows, rows, (blocks - identity).to(x.dtype)).transpose(0, 1)
            x = _spread(rows.reshape(x.shape), step, b)
        return x

    def changed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"weight": W (B_m … B_1)ᵀ}``."""
        weight = parameters["weight"]
        dtype = torch.promote_types(weight.dtype, self.R.dtype)
        weight = weight.to(dtype)
        for step, blocks in self._factors():
            b = blocks.shape[-1]
            rows = _gathered(weight, step, b).unflatten(-1, (-1, b))
            rows = torch.einsum("...kb,kcb->...kc", rows, blocks.to(dtype)).flatten(-2)
            weight = _spread(rows, step, b)
        return {"weight": weight}

    @property
    def flops_per_token(self) -> int:
        """``2 · in · b`` a factor."""
        return 2 * self.R.numel()

    def _factors(self) -> Iterator[tuple[int, Tensor]]:
        """How many halves of blocks are between those a factor brings together, and its blocks ``[k, b, b]``."""
        for number, blocks in enumerate(self.R if self.R.dim() == 4 else self.R[None]):
            yield 2**number, blocks


def _gathered(x: Tensor, step: int, block: int) -> Tensor:
    """The last axis in the order in which halves of blocks that are ``step`` apart stand together."""
    return x if step == 1 else x.unflatten(-1, (-1, 2, step, block // 2)).transpose(-3, -2).flatten(-4)


def _spread(x: Tensor, step: int, block: int) -> Tensor:
    """The inverse of `_gathered`."""
    return x if step == 1 else x.unflatten(-1, (-1, step, 2, block // 2)).transpose(-3, -2).flatten(-4)
