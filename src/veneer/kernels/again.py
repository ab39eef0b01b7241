"""Tensors that are computed again for the backward rather than kept.

What a norm or a gate gives is quickly had from what they keep for a backward of their own. A map that needs it for the
gradients of its factors can refer to those instead of keeping another tensor of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class _Again(NamedTuple):
    compute: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    version: int


def computed_again(y: Tensor, compute: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """The same tensor, of which is known that ``compute(*sources)`` gives its numbers."""
    y._again = _Again(compute, sources, y._version)  # type: ignore[attr-defined]
    return y


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """What to call on which tensors to have x: itself, unless it is known how to compute it."""
    again: Any = getattr(x, "_again", None)
    if again is None or again.version != x._version:  # somebody has written into it
        return _itself, (x,)
    return again.compute, again.sources


def _itself(x: Tensor) -> Tensor:
    return x
