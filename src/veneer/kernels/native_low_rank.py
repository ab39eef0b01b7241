"""`veneer.kernels.low_rank` with all products of maps of one input in two calls, forward and backward.

On processors with tiles (`native/products.h`). Sums are rounded once where products of their own round each: of x Wᵀ
and h Bᵀ, of all that makes up dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from veneer.kernels.again import to_keep
from veneer.kernels.native import linears
from veneer.kernels.native.linears import suits

__all__ = ["LowRankLinears", "suits"]


class LowRankLinears(Function):
    """As the function of that name there, which says what its arguments are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Any, biases: Any, scales: Any, *factors: Tensor) -> tuple[Tensor, ...]:
        """All outputs; factors are A of each map, then B of each."""
        many = len(weights)
        ctx.weights, ctx.scales, ctx.shape = weights, scales, x.shape
        a, b = factors[:many], factors[many:]
        h, *outputs = linears.low_rank_linears(x.contiguous(), weights, biases, a, b, scales)
        ctx.input, sources = to_keep(x)
        ctx.save_for_backward(h, *factors, *sources)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Of x and the factors; outputs that were not used have none."""
        many = len(ctx.weights)
        h, *rest = ctx.saved_tensors
        a, b, sources = rest[:many], rest[many : 2 * many], rest[2 * many :]
        for_x, _, _, _, *for_factors = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (2 * many)
        there = [at for at, dy in enumerate(gradients) if dy is not None]
        if not there:
            return None, None, None, None, *found
        if len(there) < many:
            h = _columns(h, linears.places(a), there)
        dys = [dy.reshape(-1, dy.shape[-1]).contiguous() for dy in gradients if dy is not None]
        some = [[each[at] for at in there] for each in (ctx.weights, a, b, ctx.scales)]
        for_a, for_b = ([for_factors[at + first] for at in there] for first in (0, many))
        x = ctx.input(*sources).contiguous() if any(for_a) else None
        made = linears.low_rank_linears_backward(x, *some, h, dys, for_x, for_b)
        dx = made.pop(0).view(ctx.shape) if for_x else None
        rows = made.pop(0).split(linears.places(some[1])) if x is not None else ()
        for at, wanted, row in zip(there, for_a, rows, strict=False):
            found[at] = row[: len(a[at])].clone() if wanted else None  # a view would keep all rows
        for at, wanted in zip(there, for_b, strict=True):
            found[many + at] = made.pop(0) if wanted else None
        return dx, None, None, None, *found


def _columns(h: Tensor, widths: Sequence[int], which: Sequence[int]) -> Tensor:
    """Those of some maps."""
    parts = h.split(list(widths), 1)
    return torch.cat([parts[at] for at in which], 1)
