"""Linear maps, and products of float32 matrices by oneDNN where torch's usual library is not at its best.

    y = x Wᵀ + b,     dx = dy W

torch multiplies float32 matrices through MKL. On AVX-512 processors of other makers than MKL's own, oneDNN, which torch
comes with as well, takes 0.8 to 0.95 of the time at the sizes of a step. In all else this is torch's own product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias``: x ``[…, in]``; weight ``[out, in]`` and bias ``[out]`` get no gradients."""
    result: Tensor = _FrozenLinear.apply(x, weight, bias)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias``, without gradients: x ``[n, in]``, W ``[out, in]`` in any layout, bias ``[out]``; in ``room``,
    without a bias, where the library can write there."""
    if _suits(x):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias) if room is None else torch.mm(x, weight.t(), out=room)


def plus_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y + x Wᵀ``, perhaps in y's place; y ``[n, out]``."""
    if _suits(x):
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
        return result
    return y.addmm_(x, weight.t())


def _suits(x: Tensor) -> bool:
    """Tensors without numbers, while planning, are counted by torch's own products."""
    return x.dtype == torch.float32 and x.is_cpu and type(x) is Tensor and x.numel() > 0 and one_dnn()


@cache
def one_dnn() -> bool:
    """Whether it is the faster one here: measured on AMD's processors; on Intel's, MKL is at home."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    theirs = "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f", False)
    return bool(theirs and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dy = gradient.reshape(-1, gradient.shape[-1])
        return linear(dy, ctx.weight.t()).view(*gradient.shape[:-1], -1), None, None
