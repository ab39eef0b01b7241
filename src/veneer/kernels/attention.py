"""Scaled dot-product attention as plain batched products, some rows at a time, nothing ``[queries, keys]`` kept.

    s = q kᵀ / √d + M,   P = exp(s − L),   o = P v,      L = log Σ exp s, by row
    dv = Pᵀ do,   dS = P ⊙ (do vᵀ − D),   D = Σ do ⊙ o, by row
    dq = dS k / √d,   dk = dSᵀ q / √d                               (Dao et al. 2022, arXiv:2205.14135, §B.2)

torch's flash kernel for processors computes in float32 even where 16-bit products are many times faster. Here all
products run in 16 bits. Their outputs are rounded near zero wherever they matter: the greatest score of a row, L and
D are taken off inside the product. P is formed again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native_attention
from veneer.kernels.precision import wider
from veneer.kernels.rounds import in_steps

_ELEMENTS = 1 << 23
"""Scores that are there at a time."""
_BLOCK = 128
"""Causal queries at a time: later keys are left out."""
GAINS = {torch.bfloat16, torch.float16}
"""Dtypes whose products are faster than the flash kernel's own; in others it is left to itself but for tiles."""
LONGEST, LONGEST_CAUSAL = 512, 2048
"""Up to so many queries and keys; beyond, scores no longer fit into caches."""


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether `attention` takes these, and gains by it."""
    return (
        query.device.type == "cpu"
        and (query.dtype in GAINS or native_attention.tiled(query, key, value, mask, causal))
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
        compiled = native_attention.suits(query, key, value, mask, causal)
        mask = _added(query, mask, causal and not compiled)
        if compiled:
            mask = mask if mask is None else mask.to(query.dtype)
            output, logs = native_attention.forward(query, key, value, mask, causal, scale)
            ctx.save_for_backward(query, key, value, output, logs, mask)
            ctx.causal, ctx.scale, ctx.compiled = causal, scale, compiled
            return output
        rows, heads, queries, width = query.shape
        output = query.new_empty(rows, queries, heads, width).transpose(1, 2)  # as what comes next takes it
        logs = torch.empty(query.shape[:3], dtype=wider(query.dtype), device=query.device)
        for own, seen, masks in _parts(query, key, mask, causal):
            output[own], logs[own] = _attended(query[own], key[seen], value[seen], masks, scale)
        ctx.save_for_backward(query, key, value, output, logs, mask)
        ctx.causal, ctx.scale, ctx.compiled = causal, scale, compiled
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, logs, mask = ctx.saved_tensors
        if ctx.compiled:
            given = query, key, value, output, logs, gradient, mask, ctx.causal, ctx.scale
            return *native_attention.backward(*given), None, None, None
        dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for own, seen, masks in _parts(query, key, mask, ctx.causal):
            tensors = query[own], key[seen], value[seen], output[own], logs[own], gradient[own], masks
            dq[own], more_k, more_v = _gradients(*tensors, ctx.scale)
            dk[seen] += more_k
            dv[seen] += more_v
        return dq, dk, dv, None, None, None


def _added(query: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The mask as what is added to scores, of a block to its own keys if causal; None where all is seen."""
    if causal:
        n = min(query.shape[2], _BLOCK)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=query.device).tril_()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _parts(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[Any, Any, Tensor | None]]:
    """Some rows and queries at a time, the keys these may see, and their part of the mask."""
    rows, heads, queries, _ = query.shape
    keys = key.shape[2]
    count, block = max(_ELEMENTS // (heads * queries * keys), 1), _BLOCK if causal else queries
    for row in in_steps(rows, count):
        some = slice(row, row + count)
        for first in range(0, queries, block):
            own, seen = slice(first, first + block), slice(min(first + block, keys) if causal else keys)
            masks = mask if mask is None or len(mask) == 1 else mask[some]
            if causal and masks is not None:
                last = min(block, queries - first)
                masks = masks[:, :, :last, :last]
            yield (some, slice(None), own), (some, slice(None), seen), masks


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logarithms of the sums."""
    q, k, v = _grouped(query, key), _grouped(key, key), _grouped(value, key)
    greatest = _scores(q, k, None, mask, scale, query).amax(-1, keepdim=True).to(wider(q.dtype))
    greatest.clamp_(min=torch.finfo(q.dtype).min)  # where nothing is seen
    powers = _scores(q, k, greatest, mask, scale, query).exp_()
    sums = powers.sum(-1, keepdim=True, dtype=greatest.dtype)
    output = (powers @ v) / sums
    return output.nan_to_num_().to(query.dtype).view_as(query), (sums.log() + greatest).view(query.shape[:3])


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logs: Tensor, gradient: Tensor, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value."""
    q, o, g = (_grouped(each, key) for each in (query, output, gradient))
    k, v = _grouped(key, key), _grouped(value, key)
    logs = logs.reshape(len(q), -1, 1).nan_to_num(neginf=0.0)
    powers = _scores(q, k, logs, mask, scale, query).exp_()
    dv = powers.mT @ g
    change = _less(g, v, (g.to(logs.dtype) * o).sum(-1, keepdim=True)).mul_(powers)
    dq, dk = (change @ k).mul_(scale), (change.mT @ q).mul_(scale)
    return dq.view_as(query), dk.view_as(key), dv.view_as(value)


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """``[rows · groups, heads of a group · positions, d]``: heads that share keys become more queries of one."""
    return states.reshape(key.shape[0] * key.shape[1], -1, states.shape[-1])


def _scores(q: Tensor, k: Tensor, taken: Tensor | None, mask: Tensor | None, scale: float, query: Tensor) -> Tensor:
    """``scale · q kᵀ + mask − taken`` ``[n, queries, keys]``, the mask by the heads and queries of ``query``; a causal
    one is of the last keys only, as all queries of a block see those before."""
    rest = 1.0
    if math.frexp(scale)[0] == 0.5:  # a power of two: exact on q, which is far smaller than scores
        q = q * scale
    else:
        rest = scale
    scores = q @ k.mT if taken is None else _less(q, k, taken / rest)
    if rest != 1:
        scores.mul_(rest)
    if mask is not None:
        by_head = scores.view(*query.shape[:3], -1)
        by_head[..., by_head.shape[-1] - mask.shape[-1] :] += mask
    return scores


def _less(left: Tensor, right: Tensor, taken: Tensor) -> Tensor:
    """``left · rightᵀ − taken`` ``[n, queries, keys]``, rounded once; ``taken`` ``[n, queries, 1]`` may be wider.

    As more columns of the product: those of ``left`` are what is taken, as a sum of two numbers of its dtype.
    """
    high = taken.to(left.dtype)
    low = (taken - high).to(left.dtype)
    ones = right.new_ones(*right.shape[:-1], 1)
    return torch.cat([left, high, low], -1) @ torch.cat([right, -ones, -ones], -1).mT
