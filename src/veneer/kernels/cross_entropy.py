"""Cross-entropy over a large vocabulary, chunk by chunk, with its gradient computed in the forward.

    z = h Wᵀ + b,   loss = Σ_i log Σ_v exp z_iv − z_{i,t_i},   ∂loss/∂z = softmax(z) − onehot(t)

Logits live for one chunk of positions only, or, by tiles, of a few classes (head.h): memory does not grow with their
number times the vocabulary. What the backward needs is ``∂loss/∂h`` alone (``∂loss/∂W``, ``∂loss/∂b`` where these are
trained), which is of the size of h. (The trick of doing the backward's work in the forward: Hsu et al. 2024, Liger
Kernel, arXiv:2410.10989, §3.2.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.native import head, operations, product, tiles
from veneer.kernels.precision import wider
from veneer.kernels.rounds import in_steps

_SUMS = 1 << 20
"""Numbers of hidden states at a time by tiles: the weight is read once for each such part."""
_PRODUCT = 12 << 20
"""Logits in a chunk at most: enough for products to run at full speed."""
_CACHED = 1_600_000
"""Logits that are worked on at a time: few enough for caches."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of all positions, and at how many the target has the greatest logit.

    Args:
        hidden: ``[n, d]``.
        weight: ``[vocabulary, d]``.
        bias: ``[vocabulary]``.
        targets: ``[n]``, int64; none is to be ignored.

    Returns:
        The sum, a float32 scalar with a gradient (float64 for float64 inputs), and the count, without one. Logits are
        rounded to the dtype of ``hidden``, but for those by tiles; everything after them is computed in at least
        float32.

    Raises:
        ValueError: there are not as many targets as positions.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"There are {len(hidden)} positions, and targets of shape {tuple(targets.shape)}.")
    learned = [each is not None and each.requires_grad for each in (hidden, weight, bias)]
    if not torch.is_grad_enabled():
        learned = [False, False, False]
    result: tuple[Tensor, Tensor] = _CrossEntropySum.apply(hidden, weight, bias, targets, learned)
    return result


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets are the first of the greatest logits; only where they are among the greatest is it looked up."""
    candidates = (logits.gather(1, targets[:, None]) == logits.amax(1, keepdim=True)).flatten()
    return (logits[candidates].argmax(1) == targets[candidates]).sum()


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, learned: list[bool]
    ) -> tuple[Tensor, Tensor]:
        d_hidden, d_weight, d_bias = None, None, None
        if head.suits(hidden, weight, bias) and not (learned[1] or learned[2]):
            loss, correct, d_hidden = _at_once(hidden, weight, bias, targets, gradient=learned[0])
        else:
            loss, correct, d_hidden, d_weight, d_bias = _in_chunks(hidden, weight, bias, targets, learned)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: Tensor, correct: Tensor) -> Any:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if each is None else (each * loss).to(dtype) for each, dtype in saved), None, None)


def _at_once(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, hits and the gradient by hidden states, by tiles, where no logits are written anywhere."""
    loss, correct = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
    d_hidden = torch.empty_like(hidden) if gradient else None
    rows = _about_as_many(len(hidden), _SUMS // tiles.padded(hidden.shape[1]))
    for place in in_steps(len(hidden), rows):
        h, t = hidden[place : place + rows], targets[place : place + rows]
        change, losses, hits = head.head(h.contiguous(), weight, bias, t, gradient)
        loss += losses.sum()
        correct += hits.sum()
        if d_hidden is not None:
            d_hidden[place : place + rows] = change
    return loss, correct, d_hidden


def _about_as_many(rows: int, most: int) -> int:
    """In each of as few parts as can be."""
    parts = max(math.ceil(rows / max(most, 32)), 1)
    return max(math.ceil(rows / parts), 1)


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, learned: list[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, hits and gradients."""
    wide = wider(hidden.dtype)
    loss, correct = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
    d_hidden = torch.empty_like(hidden) if learned[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if learned[1] else None
    d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if learned[2] else None
    rows = _about_as_many(len(hidden), _PRODUCT // len(weight))
    few = min(max(_CACHED // len(weight), 1), rows)
    # Written to again and again: fresh memory of this size costs more than what is computed in it.
    room = hidden.new_empty(rows, len(weight))
    work = (
        None
        if native.suits(hidden) and hidden.dtype == weight.dtype
        else hidden.new_empty(few, len(weight), dtype=wide)
    )
    for place in in_steps(len(hidden), rows):
        h, t = hidden[place : place + rows], targets[place : place + rows]
        logits = _product(h, weight, room[: len(h)])
        if bias is not None:
            logits += bias
        if work is None:
            losses, hits = operations.cross_entropy(logits, t, any(learned))
            loss += losses.sum()
            correct += hits.sum()
        else:
            for first in in_steps(len(t), few):
                own, some = t[first : first + few], logits[first : first + few]
                correct += _hits(some, own)
                loss += _loss(some, own, work[: len(own)], gradient=any(learned))
        if d_hidden is not None:
            _product(logits, weight, d_hidden[place : place + rows], by_depth=True)
        if d_weight is not None:
            d_weight += logits.t() @ h
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=wide)
    return loss, correct, d_hidden, d_weight, d_bias


def _product(x: Tensor, weight: Tensor, y: Tensor, *, by_depth: bool = False) -> Tensor:
    """``x weightᵀ``, or ``x weight`` by depth, in y."""
    if product.suits(x, weight, by_depth=by_depth):
        wide = torch.float32 if by_depth else y.dtype  # a large vocabulary is summed part by part
        given = y if y.dtype == wide and y.is_contiguous() else y.new_empty(y.shape, dtype=wide)
        product.product(x.contiguous(), weight, None, by_depth, given)
        return y if given is y else y.copy_(given)
    return torch.mm(x, weight if by_depth else weight.t(), out=y)


def _loss(logits: Tensor, targets: Tensor, work: Tensor, *, gradient: bool) -> Tensor:
    """Sum of the cross-entropies; with ``gradient``, that of the logits in their place. ``work`` is of their shape."""
    work.copy_(logits)
    work -= work.amax(1, keepdim=True)
    own = (torch.arange(len(targets), device=targets.device), targets)
    loss = -work[own].sum()
    total = work.exp_().sum(1, keepdim=True)
    if gradient:
        work /= total
        work[own] -= 1
        logits.copy_(work)
    return loss + total.log().sum()
