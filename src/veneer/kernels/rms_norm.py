"""Root-mean-square norm with a backward of its own.

    x̂ = x · ρ,  ρ = (mean x² + ε)^−½,   y = w ⊙ x̂,       dx = ρ (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂))

(Zhang & Sennrich 2019, arXiv:1910.07467, §4.) Computed in at least float32, as models do; kept for the backward are x,
in its own dtype, and ρ, one number a position. In one pass where that is compiled (`veneer.kernels.native`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.again import computed_again
from veneer.kernels.native import operations
from veneer.kernels.precision import wider


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, rounded: bool) -> Tensor:
    """``weight ⊙ x / √(mean x² + eps)`` over the last axis of x, in its dtype.

    Args:
        x: ``[…, d]``.
        weight: ``[d]``; gets no gradient.
        eps: ε.
        rounded: round x̂ to the dtype before it is weighted, as most models do, rather than after.
    """
    y, rho = _RMSNorm.apply(x, weight, eps, rounded)
    return computed_again(y, partial(_normed, rounded), x, weight, rho)


def _normed(rounded: bool, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    if _compiled(x, weight):
        y: Tensor = operations.rms_normed(x.contiguous(), weight.float().contiguous(), rho, rounded)
        return y
    normed = x.to(rho.dtype, copy=True).mul_(rho)  # operands of one dtype: mixed ones are far slower
    return normed.to(x.dtype).mul_(weight) if rounded else normed.mul_(weight).to(x.dtype)


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a form in C for these."""
    return weight.shape == x.shape[-1:] and weight.device == x.device and native.suits(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounded: bool) -> tuple[Tensor, Tensor]:
        if _compiled(x, weight):
            y, rho = operations.rms_norm(x.contiguous(), weight.float().contiguous(), eps, rounded)
        else:
            rho = x.to(wider(x.dtype)).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            y = _normed(rounded, x, weight, rho)
        ctx.save_for_backward(x, weight, rho)
        ctx.mark_non_differentiable(rho)
        return y, rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        x, weight, rho = ctx.saved_tensors
        if _compiled(x, weight) and native.suits(x, gradient):
            dx = operations.rms_norm_backward(x.contiguous(), weight.float().contiguous(), rho, gradient.contiguous())
            return dx, None, None, None
        dy = gradient.to(rho.dtype, copy=True).mul_(weight.to(rho.dtype))
        normed = x.to(rho.dtype, copy=True).mul_(rho)
        mean = torch.linalg.vecdot(dy, normed).unsqueeze(-1).div_(x.shape[-1])
        return dy.addcmul_(normed, mean, value=-1).mul_(rho).to(x.dtype), None, None, None
