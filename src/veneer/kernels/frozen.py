"""A linear map that learns nothing, by tiles where a processor has them (`native/products.h`).

y = x Wᵀ + b,     dx = dy W
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.native import product, tiles


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x ``[…, in]``, weight ``[out, in]``, bias ``[out]``; torch's where something learns or there is no other form."""
    learned = weight.requires_grad or (bias is not None and bias.requires_grad)
    back = len(weight) % tiles.SIDE == 0 and sum(weight.shape) <= tiles.WIDTHS  # the gradient is as wide as y
    fit = not learned and (weight.dtype == torch.float32 or back) and product.suits(x, weight, bias)
    if fit and not torch.is_autocast_enabled(x.device.type):
        result: Tensor = _Frozen.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], len(weight))
        product.product(x.contiguous(), weight, bias, False, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dx = gradient.new_empty(*gradient.shape[:-1], ctx.weight.shape[1])
        product.product(gradient.contiguous(), ctx.weight, None, True, dx)
        return dx, None, None
