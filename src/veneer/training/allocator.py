"""Memory that one training step frees and the next one needs again, kept by the process.

glibc's allocator returns large blocks to the system as they are freed, and the system hands out zeroed pages when they
are asked for again: on a processor a tenth of a step, and more. While training goes on such blocks are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
_ALL = 2**31 - 1
_DEFAULT = 128 * 1024


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block, freed memory stays with the process; nothing, where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, _ALL)
    try:
        yield
    finally:
        _set(libc, _DEFAULT)
        libc.malloc_trim(0)


def _set(libc: Any, limit: int) -> None:
    for which in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        libc.mallopt(which, limit)


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
