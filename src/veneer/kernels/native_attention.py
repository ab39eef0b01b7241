"""`veneer.kernels.attention` with everything between its products compiled.

Without a mask, and on a processor with tiles, all of it (`native/attention.h`), in float32, too. Elsewhere the products
are torch's; what is between them, each in one pass over the scores: the greatest of a row, exponentials with their
sums, dS. Scores in 16 bits are computed twice, as there, so that they are rounded near zero: what is taken off is part
of the second product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels import native
from veneer.kernels.native import attention as by_tiles
from veneer.kernels.native import operations as c
from veneer.kernels.rounds import in_steps

_SCORES = 1 << 21
"""Scores that are there at a time: few enough for caches."""
_BLOCK = 128
"""Causal queries at a time: later keys are left out."""


def tiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether all of it is computed by tiles."""
    return mask is None and by_tiles.suits(query, key, value, causal)


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether this computes what `attention` does with these arguments."""
    if query.dtype != torch.bfloat16:
        return tiled(query, key, value, mask, causal)
    dense = all(each.stride(-1) == 1 for each in (query, key, value))
    readable = mask is None or (mask.dim() == 4 and mask.stride(-1) == 1)
    return dense and readable and native.suits(query) and native.suits(key, value)


class _Part(NamedTuple):
    """Some rows and queries, with the keys these may see."""

    own: Any
    seen: Any
    mask: Tensor | None
    first: int
    """The last key that the first query sees; -1 where all see all."""


def _parts(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Iterator[_Part]:
    rows, heads, queries, _ = query.shape
    keys = key.shape[2]
    block = min(_BLOCK, queries) if causal else queries
    count = max(_SCORES // (heads * block * keys), 1)
    for row in in_steps(rows, count):
        some = slice(row, row + count)
        of_rows = mask if mask is None or len(mask) == 1 else mask[some]
        for first in reversed(range(0, queries, block)):  # the one that sees all keys comes first
            own, seen = slice(first, first + block), slice(first + block if causal else keys)
            whole = slice(None)
            yield _Part((some, whole, own), (some, whole, seen), of_rows, first if causal else -1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output, heads beside each other in memory, and the logarithms of the sums ``[rows, heads, queries]``."""
    if tiled(query, key, value, mask, causal):
        found: tuple[Tensor, Tensor] = by_tiles.attention(query, key, value, causal, scale)
        return found
    rows, heads, queries, width = query.shape
    output = query.new_empty(rows, queries, heads, width).transpose(1, 2)
    logs = query.new_empty(rows, heads, queries, dtype=torch.float32)
    before, after = _split(scale)
    for own, seen, masks, first in _parts(query, key, mask, causal):
        q, k = _packed(query[own], before), _packed(key[seen], 1.0, -1.0)
        scores = _product(q, k)
        taken = c.greatest(scores, masks, first, after)
        c.columns(q, taken, 1 / after)
        torch.bmm(_joined(q, k), _joined(k, k).mT, out=_joined(scores, k))
        sums = c.powers(scores, masks, first, after)
        c.divided(_onto(scores, _dense(value[seen])), sums, taken, output[own])
        logs[own] = taken
    return output, logs


def backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logs: Tensor, gradient: Tensor, mask: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value; dense."""
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    if tiled(query, key, value, mask, causal):
        given = query, key, value, output, gradient, logs, causal, scale
        found: tuple[Tensor, Tensor, Tensor] = by_tiles.attention_backward(*given)
        return found
    dq, dk, dv = (each.new_empty(each.shape) for each in (query, key, value))
    before, after = _split(scale)
    for own, seen, masks, first in _parts(query, key, mask, causal):
        q, k, v, g = query[own], key[seen], value[seen], gradient[own]
        taken, dots = logs[own].contiguous(), c.dots(g, output[own])
        powers = _product(_packed(q, before, 1 / after, taken), _packed(k, 1.0, -1.0))
        c.powers(powers, masks, first, after)
        change = _product(_packed(g, 1.0, 1.0, dots), _packed(v, 1.0, -1.0))
        c.change(change, powers)
        begun = causal and first + _BLOCK < query.shape[2]
        _add(dv[seen], powers, _dense(g), 1.0, begun)
        _add(dk[seen], change, _dense(q), scale, begun)
        c.pack(_onto(change, _dense(k)), dq[own], scale, False)
    return dq, dk, dv


def _split(scale: float) -> tuple[float, float]:
    """What queries are multiplied by, and what scores: a power of two is exact on queries, which are far fewer."""
    return (scale, 1.0) if math.frexp(scale)[0] == 0.5 else (1.0, scale)


def _packed(x: Tensor, scale: float, share: float = 0.0, taken: Tensor | None = None) -> Tensor:
    """``scale · x``, dense, with two more columns, which `operations.pack` describes."""
    packed = x.new_empty(*x.shape[:-1], x.shape[-1] + 2)
    c.pack(x, packed, scale, True, taken, share)
    return packed


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x
    y = x.new_empty(x.shape)
    c.pack(x, y, 1.0, False)
    return y


def _joined(x: Tensor, key: Tensor) -> Tensor:
    """``[rows · groups, heads of a group · places, …]`` of dense ``[rows, heads, places, …]``."""
    return x.view(key.shape[0] * key.shape[1], -1, x.shape[-1])


def _product(x: Tensor, key: Tensor) -> Tensor:
    """``x · keyᵀ``, by heads of x."""
    return torch.bmm(_joined(x, key), _joined(key, key).mT).view(*x.shape[:-1], -1)


def _onto(scores: Tensor, value: Tensor) -> Tensor:
    """``scores · value``, by heads of scores."""
    return torch.bmm(_joined(scores, value), _joined(value, value)).view(*scores.shape[:-1], -1)


def _add(total: Tensor, scores: Tensor, x: Tensor, scale: float, begun: bool) -> None:
    """``scale · scoresᵀ · x`` to a total by groups, which it begins unless that is begun."""
    flat = total.flatten(0, 1)
    torch.baddbmm(flat, _joined(scores, total).mT, _joined(x, total), beta=int(begun), alpha=scale, out=flat)
