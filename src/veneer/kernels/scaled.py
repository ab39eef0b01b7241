"""Features times a factor each, of which the bias of the map that made them may be left out.

    y = v ⊙ x + (1 − v) ⊙ b,     dx = v ⊙ dy,   dv = Σ dy ⊙ (x − b)

Factors are near one, where bf16 has three digits: all is computed in the wider dtype and rounded once; in one pass
where it is compiled (`veneer.kernels.native`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.native import operations


def scaled(x: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``v ⊙ x`` of x ``[…, d]`` and v ``[d]``; with a bias ``[d]``, which x contains, that is left as it is."""
    if _suits(x, v, bias):
        result: Tensor = _Scaled.apply(x, v, bias)
        return result
    y = x * v
    if bias is not None:
        y = y + bias * (1 - v)  # nothing, to the bit, where v is one
    return y.to(x.dtype)


def _suits(x: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    shape = x.shape[-1:]
    own = bias is None or (
        bias.shape == shape and bias.dtype == x.dtype and bias.is_contiguous() and not bias.requires_grad
    )
    return own and v.shape == shape and v.dtype == torch.float32 and v.device.type == "cpu" and native.suits(x)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        v = v.contiguous()
        learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if learned else None, v, bias if learned else None)
        y: Tensor = operations.scaled(x.contiguous(), v, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, v, bias = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return operations.scaled(gradient.contiguous(), v, None), None, None
        return *operations.scaled_backward(x.contiguous(), v, bias, gradient.contiguous()), None
