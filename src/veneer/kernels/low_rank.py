"""Low-rank changes of linear maps, with a backward of their own.

    y = x Wᵀ + b + s · h Bᵀ,   h = x Aᵀ
    dB = s · dyᵀ h,   dh = s · dy B,   dA = dhᵀ x,   dx = dy W + dh A

Nothing is kept for the backward but x, or what it is computed from, which the network has anyway, and the ``[n, r]``
product. Additions happen inside products: the change is added by that with B, in dx by that with A. A and B may be
wider than x: products run in x's dtype. Maps of one input share the products with A, which are too thin to be fast by
themselves, and one dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native_low_rank
from veneer.kernels.again import to_keep


def add_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``y + scale · (x Aᵀ) Bᵀ`` for a map that has been computed: x ``[…, in]``, y ``[…, out]``, A ``[r, in]``, B
    ``[out, r]``."""
    result: Tensor = _AddLowRank.apply(x, y, a, b, scale)
    return result


def low_rank_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`` of each map; weights ``[out, in]`` and biases get no gradients."""
    tiled = native_low_rank.suits(x, weights, biases, a, b)
    function = native_low_rank.LowRankLinears if tiled else _LowRankLinears
    result: tuple[Tensor, ...] = function.apply(x, weights, biases, scales, *a, *b)
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat, a, b = x.reshape(-1, x.shape[-1]).to(y.dtype), a.to(y.dtype), b.to(y.dtype)
        inner = (flat @ a.t()).mul_(scale)
        ctx.save_for_backward(flat, a, b, inner)
        ctx.scale = scale
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, b.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        for_x, _, for_a, for_b, _ = ctx.needs_input_grad
        dy = gradient.reshape(-1, gradient.shape[-1])
        dh = (dy @ b).mul_(ctx.scale) if for_x or for_a else inner
        dx = (dh @ a).view(*gradient.shape[:-1], -1) if for_x else None
        return dx, gradient, dh.t() @ x if for_a else None, dy.t() @ inner if for_b else None, None


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Any, biases: Any, scales: Any, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.weights, ctx.scales = weights, scales  # frozen: nothing that autograd would have to watch
        a, b = factors[: len(weights)], factors[len(weights) :]
        flat = x.reshape(-1, x.shape[-1])
        joined = _joined(a).to(x.dtype)
        b = tuple(each.to(x.dtype) for each in b)
        ctx.ranks = [len(each) for each in a]
        inner = _scaled(flat @ joined.t(), ctx.ranks, scales)
        parts = inner.split(ctx.ranks, 1)
        ctx.input, sources = to_keep(x)
        ctx.save_for_backward(joined, inner, *b, *sources)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        outputs = [F.linear(flat, *map_) for map_ in zip(weights, biases, strict=True)]
        for output, part, factor in zip(outputs, parts, b, strict=True):
            output.addmm_(part, factor.t())
        # no views: autograd refuses to let anybody write into a view that is one of several outputs
        return tuple(torch.ops.aten._unsafe_view(each, [*x.shape[:-1], each.shape[-1]]) for each in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, inner, *rest = ctx.saved_tensors
        b, sources = rest[: len(ctx.weights)], rest[len(ctx.weights) :]
        for_x, _, _, _, *for_factors = ctx.needs_input_grad
        for_a, for_b = for_factors[: len(b)], for_factors[len(b) :]
        parts = inner.split(ctx.ranks, 1)
        dys = {at: dy.reshape(-1, dy.shape[-1]) for at, dy in enumerate(gradients) if dy is not None}
        da: list[Tensor | None] = [None] * len(b)
        db: list[Tensor | None] = [None] * len(b)
        dx = None
        if not dys:
            return None, None, None, None, *da, *db
        for at, dy in dys.items():
            if for_b[at]:
                db[at] = dy.t() @ parts[at]
        if for_x or any(for_a):
            ranks = [ctx.ranks[at] for at in dys]
            dh = _scaled(_joined([dy @ b[at] for at, dy in dys.items()], 1), ranks, [ctx.scales[at] for at in dys])
            if any(for_a):
                rows = (dh.t() @ ctx.input(*sources).reshape(-1, ctx.shape[-1])).split(ranks)
                for at, row in zip(dys, rows, strict=True):
                    da[at] = row if for_a[at] else None
            if for_x:
                (first, dy), *others = dys.items()
                dx = dy @ ctx.weights[first]
                for at, dy in others:
                    dx.addmm_(dy, ctx.weights[at])
                every = a.split(ctx.ranks)
                dx = dx.addmm_(dh, a if len(dys) == len(b) else _joined([every[at] for at in dys])).view(ctx.shape)
        return dx, None, None, None, *da, *db


def _joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.cat(list(tensors), axis) if len(tensors) > 1 else tensors[0]


def _scaled(joined: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Some columns times each scale, in place."""
    if len(set(scales)) == 1:
        return joined if scales[0] == 1 else joined.mul_(scales[0])
    for part, scale in zip(joined.split(list(ranks), 1), scales, strict=True):
        part.mul_(scale)
    return joined
