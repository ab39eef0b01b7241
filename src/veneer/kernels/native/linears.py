"""Linear maps with low-rank changes by tiles, as operations of torch's library ``veneer``.

Tensors are dense; x and gradients have any number of rows. A map's columns of h, and of what belongs to it, are
as many as its rank, up to a multiple of 32, noughts at the end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from veneer.kernels.native import tiles
from veneer.kernels.native.operations import address, operation

_MAPS = 8


def suits(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor]
) -> bool:
    """Whether there is a compiled form for such maps: a few of bfloat16 or float32 on a processor with tiles, widths in
    steps of 32 and not very large, dense, all factors A of one dtype and all B of one, as wide as x or wider; and
    whether shapes fit."""
    given = [each for each in biases if each is not None]
    tensors = [x, *weights, *given]
    every = [*tensors, *a, *b]
    if not (tiles.there() and x.numel() > 0 and 0 < len(weights) <= _MAPS):
        return False
    here = all(each.device.type == "cpu" and tiles.ordinary(each) for each in every)
    alike = x.dtype in tiles.PARTS and all(each.dtype == x.dtype for each in tensors)
    kept = all(len({each.dtype for each in some}) == 1 and some[0].dtype in (x.dtype, torch.float32) for some in (a, b))
    dense = all(each.is_contiguous() for each in every[1:])
    return here and alike and kept and dense and _fit(x.shape[-1], weights, biases, a, b)


def _fit(
    width: int, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor]
) -> bool:
    outs, ranks = [len(each) for each in weights], [len(each) for each in a]
    few = weights[0].dtype == torch.float32 or width + sum(outs) <= tiles.WIDTHS
    even = all(each % tiles.SIDE == 0 for each in (width, *outs)) and few
    shapes = zip(weights, biases, a, b, outs, ranks, strict=True)
    return even and all(
        weight.shape == (out, width)
        and (bias is None or bias.shape == (out,))
        and (rank > 0 and first.shape == (rank, width) and second.shape == (out, rank))
        for weight, bias, first, second, out, rank in shapes
    )


def _all(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*map(address, tensors))


def _maps(weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> Any:
    """How they are told: dtypes of the factors, widths, ranks, scales."""
    many = len(weights)
    wide = (ctypes.c_int * 2)(*(some[0].dtype == torch.float32 for some in (a, b)))
    outs = (ctypes.c_int64 * many)(*(len(each) for each in weights))
    ranks = (ctypes.c_int64 * many)(*(len(each) for each in a))
    return wide, outs, ranks, (ctypes.c_float * many)(*scales)


def places(a: Sequence[Tensor]) -> list[int]:
    """Columns of h that belong to each map."""
    return [tiles.padded(len(each)) for each in a]


def _forward_shapes(x: Tensor, weights: Sequence[Tensor], biases: Any, a: Sequence[Tensor], *args: Any) -> list[Tensor]:
    leading = x.shape[:-1]
    outputs = [x.new_empty(*leading, len(each)) for each in weights]
    return [x.new_empty(leading.numel(), sum(places(a))), *outputs]


@operation(
    "low_rank_linears(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scales)"
    " -> Tensor[]",
    _forward_shapes,
)
def low_rank_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """h ``[n, places]`` and each y ``[…, out]`` of x ``[…, in]``, which is dense."""
    made = _forward_shapes(x, weights, biases, a)
    h, *ys = made
    width = x.shape[-1]
    wide, outs, ranks, factors = _maps(weights, a, b, scales)
    work = tiles.work(x, "low_rank_work", [width + max(places(a)), max(width, *outs)])
    tiles.function("low_rank_linears", "pnnipppppppppnppnii")(
        address(x), len(h), width, len(weights), _all(weights), _all(biases), _all(a), _all(b), wide, outs,
        ranks, factors, address(h), h.shape[1], _all(ys), address(work), work.shape[1],
        tiles.PARTS[x.dtype], len(work),
    )  # fmt: skip
    return made


def _backward_shapes(
    x: Tensor | None, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Any, h: Tensor,
    dys: Any, for_x: bool, for_b: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    width = weights[0].shape[1]
    made = [h.new_empty(len(h), width)] if for_x else []
    if x is not None:
        made.append(a[0].new_empty(sum(places(a)), width))
    return made + [torch.empty_like(each) for each, wanted in zip(b, for_b, strict=True) if wanted]


@operation(
    "low_rank_linears_backward(Tensor? x, Tensor[] weights, Tensor[] a, Tensor[] b, float[] scales, Tensor h,"
    " Tensor[] dys, bool for_x, bool[] for_b) -> Tensor[]",
    _backward_shapes,
)
def low_rank_linears_backward(
    x: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    h: Tensor,
    dys: Sequence[Tensor],
    for_x: bool,
    for_b: Sequence[bool],
) -> list[Tensor]:
    """dx ``[n, in]`` if it is asked for, dA of all maps ``[places, in]`` if there is x, and each dB asked for; of dy
    ``[n, out]``, one for each map."""
    made = _backward_shapes(x, weights, a, b, scales, h, dys, for_x, for_b)
    rest = list(made)
    dx = rest.pop(0) if for_x else None
    da = rest.pop(0) if x is not None else None
    dbs = [rest.pop(0) if wanted else None for wanted in for_b]
    rows, width = len(h), weights[0].shape[1]
    wide, outs, ranks, factors = _maps(weights, a, b, scales)
    dh, turned = torch.empty_like(h), h.new_empty(2 * h.shape[1], tiles.padded(rows))
    deepest = max(sum(outs) + h.shape[1], tiles.padded(rows))
    work = tiles.work(h, "low_rank_work", [deepest, max(width, *outs)])
    tiles.function("low_rank_linears_backward", "pnnippppppppnpppppppnii")(
        address(x), rows, width, len(weights), _all(weights), _all(a), _all(b), wide, outs, ranks, factors, address(h),
        h.shape[1], _all(dys), address(dh), address(turned), address(dx), address(da), _all(dbs), address(work),
        work.shape[1], tiles.PARTS[h.dtype], len(work),
    )  # fmt: skip
    return made


@register_flop_formula(torch.ops.veneer.low_rank_linears)
def _forward_flops(x: Any, weights: Any, biases: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    each = (out * width + rank * (out + width) for (out, width), (rank, _) in zip(weights, a, strict=True))
    return int(2 * torch.Size(x[:-1]).numel() * sum(each))


@register_flop_formula(torch.ops.veneer.low_rank_linears_backward)
def _backward_flops(
    x: Any, weights: Any, a: Any, b: Any, scales: Any, h: Any, dys: Any, for_x: bool, for_b: Sequence[bool],
    **kwargs: Any,
) -> int:  # fmt: skip
    count = 0
    for (out, width), (rank, _), own in zip(weights, a, for_b, strict=True):
        count += rank * out * (1 + own) + for_x * width * (out + rank) + (x is not None) * rank * width
    return int(2 * h[0] * count)
