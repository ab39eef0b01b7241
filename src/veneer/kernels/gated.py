"""A gate times a value, as in gated feed-forward layers, keeping only its two inputs for the backward.

    y = f(g) ⊙ u,     du = f(g) ⊙ dy,   dg = f'(g) ⊙ u ⊙ dy          f(g) is computed again there

(GLU variants: Shazeer 2020, arXiv:2002.05202.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.again import computed_again


def gated(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``act(gate) ⊙ up``; ``act`` is element-wise and has no parameters."""
    return computed_again(_Gated.apply(gate, up, act), partial(_product, act), gate, up)


def _product(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _product(act, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            opened = ctx.act(gate)
        (dg,) = torch.autograd.grad(opened, gate, gradient * up)
        return dg, opened.detach().mul_(gradient), None
