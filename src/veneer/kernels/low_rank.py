"""A low-rank change of a linear map, with a backward of its own.

    y = x Wᵀ + b + s · h Bᵀ,   h = x Aᵀ
    dB = s · dyᵀ h,   dh = s · dy B,   dA = dhᵀ x,   dx = dy W + dh A

Nothing is kept for the backward but x, which the network has anyway, and the ``[n, r]`` product. Additions happen
inside products: the change is added by that with B, in dx by that with A. A and B may be wider than x: products run in
x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``y + scale · (x Aᵀ) Bᵀ`` for a map that has been computed: x ``[…, in]``, y ``[…, out]``, A ``[r, in]``, B
    ``[out, r]``."""
    result: Tensor = _AddLowRank.apply(x, y, a, b, scale)
    return result


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x Wᵀ + bias + scale · (x Aᵀ) Bᵀ``, W ``[out, in]`` and the bias without gradients."""
    result: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale)
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner, b = _inner(ctx, x, y, a, b, scale)
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, b.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        for_x, _, for_a, for_b, _ = ctx.needs_input_grad
        dh, da, db = _factors(ctx, gradient, x, b, inner, for_x, for_a, for_b)
        dx = None if not for_x else (dh @ a).view(*gradient.shape[:-1], -1)
        return dx, gradient, da, db, None


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.weight = weight  # frozen: nothing that autograd would have to watch
        y = F.linear(x, weight, bias)
        inner, b = _inner(ctx, x, y, a, b, scale)
        y.view(-1, y.shape[-1]).addmm_(inner, b.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        dh, da, db = _factors(ctx, gradient, x, b, inner, for_x, for_a, for_b)
        dx = None
        if for_x:
            dx = (gradient.reshape(len(x), -1) @ ctx.weight).addmm_(dh, a).view(*gradient.shape[:-1], -1)
        return dx, None, None, da, db, None


def _inner(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """s · h, and B in the dtype of the products."""
    x, a, b = x.reshape(-1, x.shape[-1]).to(y.dtype), a.to(y.dtype), b.to(y.dtype)
    inner = (x @ a.t()).mul_(scale)
    ctx.save_for_backward(x, a, b, inner)
    ctx.scale = scale
    return inner, b


def _factors(
    ctx: Any, gradient: Tensor, x: Tensor, b: Tensor, inner: Tensor, for_x: bool, for_a: bool, for_b: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh, dA and dB."""
    dy = gradient.reshape(-1, gradient.shape[-1])
    dh = (dy @ b).mul_(ctx.scale) if for_x or for_a else inner
    return dh, dh.t() @ x if for_a else None, dy.t() @ inner if for_b else None
