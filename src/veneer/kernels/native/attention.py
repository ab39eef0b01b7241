"""Attention by tiles, as operations of torch's library ``veneer``.

Heads ``[rows, heads, places, d]`` are dense in their last axis; what is made has the heads of a place beside each other
in memory, as linear maps give and take them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from veneer.kernels.native import tiles
from veneer.kernels.native.operations import address, operation, strides

_WIDEST = 256


def suits(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Whether there is a compiled form for such heads: of bfloat16 or float32, on a processor with tiles, widths in
    steps of 32, and groups enough for all threads; causal ones with as many keys as queries."""
    three = query, key, value
    if not all(each.device.type == "cpu" and each.numel() > 0 and tiles.ordinary(each) for each in three):
        return False
    rows, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    alike = query.dtype in tiles.PARTS and all(each.dtype == query.dtype and each.stride(-1) == 1 for each in three)
    fit = key.shape == value.shape == (rows, groups, keys, width) and heads % groups == 0
    fit = fit and (queries == keys or not causal)
    even = width % tiles.SIDE == 0 and width <= _WIDEST
    return alike and fit and even and rows * groups >= torch.get_num_threads() and tiles.there()


def _beside(x: Tensor) -> Tensor:
    """Heads of this shape."""
    rows, heads, places, width = x.shape
    return x.new_empty(rows, places, heads, width).transpose(1, 2)


def _forward_shapes(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _beside(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _sizes(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Rows, heads, groups, queries, keys, width."""
    return (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3])


def _told(*heads: Tensor) -> list[Any]:
    """Where they are, and their strides."""
    return [each for x in heads for each in (address(x), strides(x))]


@operation(
    "attention(Tensor query, Tensor key, Tensor value, bool causal, float scale) -> (Tensor, Tensor)", _forward_shapes
)
def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and the logarithms of the sums ``[rows, heads, queries]``; keys and values may have fewer heads."""
    output, logs = _forward_shapes(query)
    sizes = _sizes(query, key)
    work = tiles.work(query, "attention_work", sizes[3:])
    tiles.function("attention", "ps" * 4 + "p" + "n" * 6 + "ifpnii")(
        *_told(query, key, value, output),
        address(logs),
        *sizes,
        causal,
        scale,
        address(work),
        work.shape[1],
        tiles.PARTS[query.dtype],
        len(work),
    )
    return output, logs


def _backward_shapes(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _beside(query), _beside(key), _beside(value)


@operation(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor output, Tensor gradient, Tensor logs,"
    " bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _backward_shapes,
)
def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, logs: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value."""
    made = _backward_shapes(query, key, value)
    sizes = _sizes(query, key)
    work = tiles.work(query, "attention_work", sizes[3:])
    tiles.function("attention_backward", "ps" * 5 + "p" + "ps" * 3 + "n" * 6 + "ifpnii")(
        *_told(query, key, value, output, gradient), address(logs), *_told(*made), *sizes, causal, scale, address(work),
        work.shape[1], tiles.PARTS[query.dtype], len(work),
    )  # fmt: skip
    return made


@register_flop_formula(torch.ops.veneer.attention)
def _forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, _for_all(query, key), _for_all(query, value)))


@register_flop_formula(torch.ops.veneer.attention_backward)
def _backward_flops(query: Any, key: Any, value: Any, output: Any, gradient: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, _for_all(query, key), _for_all(query, value)))


def _for_all(query: Any, key: Any) -> Any:
    """The shape as if each head had its own."""
    return (key[0], query[1], *key[2:])
