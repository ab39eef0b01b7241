"""A low-rank change added to a linear map's output, with a backward of its own.

    y' = y + s · (x Aᵀ) Bᵀ
    dB = s · dy'ᵀ (x Aᵀ),   dh = s · dy' B,   dA = dhᵀ x,   dx = dh A,   dy = dy'

Nothing is kept for the backward but x, which the network has anyway, and the ``[n, r]`` product. The addition happens
inside the product with B. A and B may be wider than x: products run in x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``y + scale · (x Aᵀ) Bᵀ``: x ``[…, in]``, y ``[…, out]``, A ``[r, in]``, B ``[out, r]``."""
    result: Tensor = _AddLowRank.apply(x, y, a, b, scale)
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x, a, b = x.reshape(-1, x.shape[-1]).to(y.dtype), a.to(y.dtype), b.to(y.dtype)
        inner = (x @ a.t()).mul_(scale)
        ctx.save_for_backward(x, a, b, inner)
        ctx.scale = scale
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, b.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        for_x, _, for_a, for_b, _ = ctx.needs_input_grad
        dy = gradient.reshape(-1, gradient.shape[-1])
        dx = da = None
        if for_x or for_a:
            dh = (dy @ b).mul_(ctx.scale)
            dx = (dh @ a).view(*gradient.shape[:-1], -1) if for_x else None
            da = dh.t() @ x if for_a else None
        return dx, gradient, da, dy.t() @ inner if for_b else None, None
