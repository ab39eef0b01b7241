"""Products of float32 matrices by oneDNN where torch's usual library is not at its best.

    y = x Wᵀ + b,     dx = dy W,   dW = dyᵀ x,   db = Σ dy

torch multiplies float32 matrices through MKL. On AVX-512 processors of other makers than MKL's own, oneDNN, which torch
comes with as well, takes 0.8 to 0.95 of the time at the sizes of a step. In all else these are torch's own products.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` with gradients: x ``[…, in]``, weight ``[out, in]``, bias ``[out]``."""
    result: Tensor = _LinearMap.apply(x, weight, bias)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias``, without gradients: x ``[n, in]``, W ``[out, in]``, bias ``[out]``; in ``room``, without a bias,
    unless it is `by_one_dnn`, which makes tensors of its own."""
    if by_one_dnn(x, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias) if room is None else torch.mm(x, weight.t(), out=room)


def times(y: Tensor, weight: Tensor) -> Tensor:
    """``y W``, without gradients: y ``[n, out]``, W ``[out, in]``."""
    return linear(y, weight.t()) if by_one_dnn(y, weight) else y @ weight


def plus_times(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``x + y W``, perhaps in x's place: x ``[n, in]``, y ``[n, out]``, W ``[out, in]``."""
    if by_one_dnn(y, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(y, x, weight.t(), None, "add")
        return result
    return x.addmm_(y, weight)


def by_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Whether products of these are. Tensors without numbers, while planning, are counted by torch's own, and classes
    of tensors have products of their own."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return plain and x.dtype == weight.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and one_dnn()


@cache
def one_dnn() -> bool:
    """Whether it is the faster one here: measured on AMD's processors; on Intel's, MKL is at home. Not where torch
    can't tell the processor's name."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    theirs = "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f", False)
    return bool(theirs and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return linear(x.reshape(-1, weight.shape[1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dy = gradient.reshape(-1, len(weight))
        dx = linear_map(gradient, weight.t(), None) if for_x else None
        dw = (
            dy.t() @ x.reshape(-1, weight.shape[1]) if for_weight else None
        )  # oneDNN is slow with dy the other way round
        return dx, dw, dy.sum(0) if for_bias else None
