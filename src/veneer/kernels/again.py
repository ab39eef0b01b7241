"""Tensors that are computed again for the backward rather than kept.

What a norm or a gate gives is quickly had from what they keep for a backward of their own. A map that needs it for the
gradients of its factors can refer to those instead of keeping another tensor of that size.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Again(NamedTuple):
    compute: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    """Of the tensor and its sources."""


_KNOWN: MutableMapping[Tensor, _Again] = WeakTensorKeyDictionary()


def computed_again(y: Tensor, compute: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """The same tensor, of which is known that ``compute(*sources)`` gives its numbers; unless there will be no backward
    that keeps these."""
    if y.requires_grad:
        _KNOWN[y] = _Again(compute, sources, _versions(y, *sources))
    return y


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """What to call on which tensors to have x: itself, unless it is known how to compute it."""
    again = _KNOWN.get(x)
    if again is None or again.versions != _versions(x, *again.sources):  # somebody has written into one
        return _itself, (x,)
    return again.compute, again.sources


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(each._version for each in tensors)


def _itself(x: Tensor) -> Tensor:
    return x
