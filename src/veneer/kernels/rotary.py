"""Rotary position embeddings with a backward of its own; nothing is negated, joined or kept.

    y₁ = x₁ cos₁ − x₂ sin₁,   y₂ = x₂ cos₂ + x₁ sin₂,       dx₁ = dy₁ cos₁ + dy₂ sin₂,   dx₂ = dy₂ cos₂ − dy₁ sin₁

x₁ and x₂ are the halves of a head (Su et al. 2021, arXiv:2104.09864, §3.4.2; halves rather than neighbours, as most
models have it). In 16 bits every product and sum is rounded where models round it; the form in C fuses them in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.native import operations


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[…, d]`` turned by angles with these cosines and sines, which fit x and get no gradient."""
    result: Tensor = _Rotary.apply(x, cos, sin)
    return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if _compiled(x, cos, sin):
            turned: Tensor = operations.rotary(x, cos, sin, False)
            return turned
        y = x * cos
        (y1, y2), (x1, x2), (sin1, sin2) = (each.chunk(2, -1) for each in (y, x, sin))
        y1 -= x2 * sin1
        y2 += x1 * sin2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if _compiled(gradient, cos, sin):
            return operations.rotary(gradient, cos, sin, True), None, None
        dx = gradient * cos
        (dx1, dx2), (dy1, dy2), (sin1, sin2) = (each.chunk(2, -1) for each in (dx, gradient, sin))
        dx1 += dy2 * sin2
        dx2 -= dy1 * sin1
        return dx, None, None


def _compiled(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether shapes and dtypes are those of the compiled form."""
    if x.dim() != 4 or cos.shape != sin.shape or x.stride(-1) != 1 or x.shape[-1] % 2:
        return False
    of_all, of_each = ((rows, 1, *x.shape[2:]) for rows in (1, len(x)))
    dense = cos.shape in (of_all, of_each) and cos.is_contiguous() and sin.is_contiguous()
    return dense and x.dtype == cos.dtype and native.suits(x) and native.suits(cos, sin)
