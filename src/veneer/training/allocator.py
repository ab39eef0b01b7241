"""The heap of a process that trains on a processor: memory is kept from step to step, and with few gaps.

glibc's allocator returns large blocks to the system as they are freed, and the system hands out zeroed pages when they
are asked for again: a tenth of a step, and more. While training goes on such blocks are kept.

torch asks for blocks that begin at multiples of 64 bytes. glibc looks for one some 100 bytes larger, and what is left
at both ends goes into its caches of small blocks, from which the next small object takes it. A block that is freed then
cannot join what surrounds it, and is too short for another of its own size: steps in which much is made and freed hold
up to three times what is alive. Without these caches, and with a stock of small blocks in the queues that small objects
are served from, the ends mostly still lie there when their block is freed. The cache of each thread can only be turned
off when a process begins (`sparing_environment`); the command ``veneer`` sees to it before it trains.

oneDNN, which multiplies in 16 bit, generates code for each shape of a product, some 0.6 MB, and torch and it keep the
last 1,024: with rows of uneven length, more than all activations of a small model. Those of a few passes are enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_TUNABLES, _CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
_SHARES = {False: (0.55, 0.13), True: (0.1, 0.09)}
"""What glibc's heap holds in gaps between blocks, as shares of what a layer makes in a step and of what is alive at
once; by whether it is sparing: fitted to 26 measured steps (`benchmarks/planner.py`) on either heap."""
_FAST_BLOCKS, _TRIM_THRESHOLD, _MMAP_MAX = 1, -1, -4
"""From glibc's malloc.h."""
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65536}
"""The thresholds glibc itself arrives at once large blocks have been freed."""
_FAST = 16 * ctypes.sizeof(ctypes.c_void_p)
"""Bytes of the largest fast block, by default."""
_ENDS = range(24, 105, 16)
"""Bytes of what may be left at the ends of an aligned block."""
_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Shapes whose code is kept, by oneDNN and by torch; a step took some 40 for each number of tokens."""
_STOCK = 2000
"""Small blocks of each such size; 500 to 5,000 did about as well."""
_GPUS = ("/dev/nvidia0", "/dev/kfd")


def gaps(alive: float, made: float) -> int:
    """Bytes that a processor's heap holds besides what is alive, as freed blocks often don't take others of their size.

    Args:
        alive: bytes of activations, logits and workspace at once.
        made: bytes that a layer makes in a step, forward and backward.
    """
    of_a_layer, of_all = _SHARES[_sparing()]
    return round(of_a_layer * made + of_all * alive)


def sparing_environment() -> dict[str, str] | None:
    """Variables with which a process that trains should begin.

    Returns:
        None, where they would mean nothing (there is a GPU, another allocator, another C library) or say something of
        this already.
    """
    given = os.environ.get(_TUNABLES, "")
    elsewhere = any(Path(each).exists() for each in _GPUS) or "malloc" in os.environ.get("LD_PRELOAD", "")
    if _CACHE in given or elsewhere or _glibc() is None:
        return None
    return {**_PRODUCTS, **os.environ, _TUNABLES: ":".join(filter(None, (given, f"{_CACHE}=0")))}


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block, freed memory stays with the process, and small blocks are in stock where it began sparing,
    both where the C library is glibc; and what is there already is left out by Python's collector of cycles."""
    libc = _glibc()
    with _left_out():
        if libc is None:
            yield
            return
        try:
            _set(libc, _KEEP)
            with _stock(libc) if _sparing() else contextlib.nullcontext():
                yield
        finally:
            _set(libc, _USUAL)
            libc.malloc_trim(0)


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """Inside the block the collector doesn't go through what was there before: a model and all modules imported, some
    times a step. Cycles of such objects that are dropped inside are freed after it. Nothing, where somebody has seen to
    it already."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _sparing() -> bool:
    """Whether this process began without its threads' caches of small blocks."""
    try:
        began = Path("/proc/self/environ").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    given = next((each for each in began if each.startswith(f"{_TUNABLES}=")), "")
    return re.findall(rf"{re.escape(_CACHE)}=([^:]*)", given)[-1:] == ["0"]


@contextlib.contextmanager
def _stock(libc: Any) -> Iterator[None]:
    """Inside the block, there are small blocks in the queues; others between them keep them from being joined."""
    _set(libc, {_FAST_BLOCKS: 0})
    between = []
    try:
        for size in _ENDS:
            blocks = [libc.malloc(size) for _ in range(2 * _STOCK)]
            between += blocks[1::2]
            for block in blocks[::2]:
                libc.free(block)
        yield
    finally:
        for block in between:
            libc.free(block)
        _set(libc, {_FAST_BLOCKS: _FAST})


def _set(libc: Any, options: Mapping[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    if not all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc
