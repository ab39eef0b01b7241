"""Memory that one training step frees and the next one needs again, kept by the process.

glibc's allocator returns large blocks to the system as they are freed, and the system hands out zeroed pages when they
are asked for again: on a processor a tenth of a step, and more. While training goes on such blocks are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

_OF_A_LAYER, _OF_ALL = 0.55, 0.13
"""What glibc's heap holds in gaps between blocks, as shares of what a layer makes in a step and of what is alive at
once: fitted to 26 measured steps (`benchmarks/planner.py`)."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""From glibc's malloc.h."""
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65536}
"""The thresholds glibc itself arrives at once large blocks have been freed."""


def gaps(alive: float, made: float) -> int:
    """Bytes that a processor's heap holds besides what is alive, as freed blocks often don't take others of their size.

    Args:
        alive: bytes of activations, logits and workspace at once.
        made: bytes that a layer makes in a step, forward and backward.
    """
    return round(_OF_A_LAYER * made + _OF_ALL * alive)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block, freed memory stays with the process; nothing, where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, _KEEP)
    try:
        yield
    finally:
        _set(libc, _USUAL)
        libc.malloc_trim(0)


def _set(libc: Any, options: Mapping[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
