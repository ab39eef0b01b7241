"""Scaled dot-product attention whose backward is plain batched products, a few rows at a time.

    s = q kᵀ / √d + M,   P = exp(s − L),   o = P v,      L = log Σ exp s, by row
    dv = Pᵀ do,   dS = P ⊙ (do vᵀ − D),   D = Σ do ⊙ o, by row
    dq = dS k / √d,   dk = dSᵀ q / √d                               (Dao et al. 2022, arXiv:2205.14135, §B.2)

The forward is torch's flash kernel for processors, which keeps L. Its backward computes in float32 even where 16-bit
products are many times faster; here they run in 16 bits. Their outputs are rounded near zero wherever they matter: L
and D are taken off inside the product. P is formed again; nothing ``[queries, keys]`` is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ELEMENTS = 1 << 18
"""Scores that are there at a time, unless those of one row's block are more: few enough for caches."""
_BLOCK = 128
"""Queries at a time, or half as many where these have more than three times so many scores; causal ones see no later
keys."""
GAINS = {torch.bfloat16, torch.float16}
"""Dtypes whose products are faster than the flash kernel's own; in others it is left to itself."""
LONGEST, LONGEST_CAUSAL = 512, 2048
"""Up to so many queries and keys; beyond, torch's own is faster, or was not compared."""


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether `attention` takes these, and gains by it."""
    return (
        query.device.type == "cpu"
        and query.dtype in GAINS
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and max(query.shape[2], key.shape[2]) <= (LONGEST_CAUSAL if causal else LONGEST)
        and not (causal and query.shape[2] != key.shape[2])
        and (mask is None or (mask.shape[-1] == key.shape[2] and not mask.requires_grad))
        and torch.is_grad_enabled()
        and any(each.requires_grad for each in (query, key, value))
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """``softmax(query · keyᵀ · scale + mask) · value``; nought where a query sees no key.

    Args:
        query: ``[rows, heads, queries, d]``.
        key: ``[rows, groups, keys, d]``; heads are a multiple of groups, each group serves that many in a row.
        value: as ``key``.
        mask: bool, true where a query sees a key, or added; ``[rows, heads, queries, keys]``, or 1 for all but keys.
        causal: queries see keys up to their own place; as many keys as queries, and no mask.
        scale: of the products.
    """
    result: Tensor = _Attention.apply(query, key, value, mask, causal, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        mask = _added(query, mask)
        output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, logs, mask)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, logs, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for own, seen, masks in _parts(query, key, mask, ctx.causal):
            tensors = query[own], key[seen], value[seen], output[own], logs[own], gradient[own], masks
            dq[own], more_k, more_v = _gradients(*tensors, ctx.scale)
            dk[seen] += more_k
            dv[seen] += more_v
        return dq, dk, dv, None, None, None


def _added(query: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _parts(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[Any, Any, Tensor | None]]:
    """Some rows and queries at a time, the keys these may see, and what is added to the scores of the last of these."""
    rows, heads, queries, _ = query.shape
    keys = key.shape[2]
    block = _BLOCK if heads * _BLOCK * keys <= 3 * _ELEMENTS else _BLOCK // 2
    block = min(block, queries)
    count = max(_ELEMENTS // (heads * block * keys), 1)
    future = query.new_full((block, block), float("-inf")).triu_(1) if causal else None
    for row in range(0, rows, count):
        some = slice(row, row + count)
        for first in range(0, queries, block):
            own, seen = slice(first, first + block), slice(min(first + block, keys) if causal else keys)
            masks = None if future is None else future[: queries - first, : queries - first]
            if mask is not None:
                masks = mask[some if len(mask) > 1 else slice(None), :, own if mask.shape[2] > 1 else slice(None)]
            yield (some, slice(None), own), (some, slice(None), seen), masks


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logs: Tensor, gradient: Tensor, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value."""
    q, o, g = (_grouped(each, key) for each in (query, output, gradient))
    k, v = _grouped(key, key), _grouped(value, key)
    powers = _scores(q, k, logs.reshape(len(q), -1, 1), mask, scale, query).exp_()
    dv = powers.mT @ g
    change = _less(g, v, (g.to(logs.dtype) * o).sum(-1, keepdim=True)).mul_(powers)
    dq, dk = (change @ k).mul_(scale), (change.mT @ q).mul_(scale)
    return dq.view_as(query), dk.view_as(key), dv.view_as(value)


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """``[rows · groups, heads of a group · positions, d]``: heads that share keys become more queries of one."""
    return states.reshape(key.shape[0] * key.shape[1], -1, states.shape[-1])


def _scores(q: Tensor, k: Tensor, taken: Tensor, mask: Tensor | None, scale: float, query: Tensor) -> Tensor:
    """``scale · q kᵀ + mask − taken`` ``[n, queries, keys]``, the mask by the heads and queries of ``query``."""
    rest = 1.0
    if math.frexp(scale)[0] == 0.5:  # a power of two: exact on q, which is far smaller than scores
        q = q * scale
    else:
        rest = scale
    scores = _less(q, k, taken / rest)
    if rest != 1:
        scores.mul_(rest)
    if mask is not None:
        last = scores.view(*query.shape[:3], -1)[..., -mask.shape[-1] :]
        last += mask
    return scores


def _less(left: Tensor, right: Tensor, taken: Tensor) -> Tensor:
    """``left · rightᵀ − taken`` ``[n, queries, keys]``, rounded once; ``taken`` ``[n, queries, 1]`` may be wider.

    As more columns of the product: those of ``left`` are what is taken, as a sum of two numbers of its dtype.
    """
    high = taken.to(left.dtype)
    low = (taken - high).to(left.dtype)
    ones = right.new_ones(*right.shape[:-1], 1)
    return torch.cat([left, high, low], -1) @ torch.cat([right, -ones, -ones], -1).mT
