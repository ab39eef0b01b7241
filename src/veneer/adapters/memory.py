"""What gates remember of earlier steps of a generation: it lives in the cache of keys and values and moves with it.

Beams reorder a cache, sampling repeats it, rejected drafts crop it. A cache that carries a memory does the same to it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Memory:
    """Openings, and which tokens count, ``[rows, positions]``, of each gate."""

    def __init__(self) -> None:
        self.layers: dict[object, DynamicLayer] = {}

    def extend(self, key: object, opened: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of a step; the sums over all steps before, ``[rows, 1]`` each."""
        layer = self.layers.setdefault(key, DynamicLayer())
        before = (layer.keys, layer.values) if layer.get_seq_length() else (opened[:, :0], real[:, :0])
        layer.update(opened.detach()[:, None, :, None], real.detach()[:, None, :, None])
        return before[0].flatten(1).sum(1, keepdim=True), before[1].flatten(1).sum(1, keepdim=True)


class _Carrying(Cache):
    """A cache with a memory."""

    memory: Memory

    def reorder_cache(self, *args: Any) -> None:
        self._all("reorder_cache", *args)

    def crop(self, *args: Any) -> None:
        self._all("crop", *args)

    def reset(self, *args: Any) -> None:
        self._all("reset", *args)

    def batch_repeat_interleave(self, *args: Any) -> None:
        self._all("batch_repeat_interleave", *args)

    def batch_select_indices(self, *args: Any) -> None:
        self._all("batch_select_indices", *args)

    def _all(self, move: str, *args: Any) -> None:
        getattr(super(), move)(*args)
        for layer in self.memory.layers.values():
            getattr(layer, move)(*args)


def carried(cache: Any) -> Memory:
    """The memory of a cache; a new one if it has none, or there is no cache."""
    return cache.memory if isinstance(cache, _Carrying) else Memory()


def carry(cache: Any, memory: Memory) -> None:
    """Let a cache carry a memory, if it is one and there is anything to remember."""
    if isinstance(cache, Cache) and memory.layers:
        if not isinstance(cache, _Carrying):
            kind: Any = type(cache)
            cache.__class__ = _carrying(kind)
        cache.memory = memory


@functools.cache
def _carrying(cls: Any) -> Any:
    return type(cls.__name__, (_Carrying, cls), {})
