"""Freed memory is kept while training goes on, and only then; a sparing heap has few gaps."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import pytest

from veneer.training.allocator import kept_memory, sparing_environment

SPARING = "glibc.malloc.tcache_count=0"
PROGRAM = """
import resource, torch
from veneer.training.allocator import kept_memory

def step():
    [torch.empty(4 << 20).fill_(1.0) for _ in range(8)]  # as many activations, freed together

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

step()
before = held()
with kept_memory():
    step()
    kept = held() - before
print(kept, held() - before)
"""


LAYERS = """
import ctypes, random, torch
from veneer.training.allocator import kept_memory

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
some = random.Random(0)

def step():
    large, small = [], []
    for _ in range(24):
        for width in (1, 4, 2, 3):
            large = [*large[-5:], torch.empty(width << 16)]  # seven, while it is made
            small += [libc.malloc(some.choice((24, 40, 56, 72, 88))) for _ in range(20)]
            for _ in range(10):
                libc.free(small.pop(some.randrange(len(small))))
    for block in small:  # as nodes of a graph, held till the step's end
        libc.free(block)

with kept_memory():
    before = libc.mallinfo2().arena
    for _ in range(3):
        step()
    print(libc.mallinfo2().arena - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def told(program: str, tunables: str) -> list[int]:
    """The numbers it prints."""
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(number) for number in done.stdout.split()]


@glibc
@pytest.mark.parametrize("tunables", ["", SPARING])
def test_memory_is_kept_and_given_back(tunables: str) -> None:
    kept, after = told(PROGRAM, tunables)
    assert kept > 100e6
    assert after < 10e6


@glibc
def test_a_sparing_heap_has_fewer_gaps() -> None:
    (usual,), (sparing,) = told(LAYERS, ""), told(LAYERS, SPARING)
    alive = 19 << 18
    assert sparing < 1.25 * alive
    assert usual > 1.5 * alive  # 1.64 or 5.86 times: where the program's own objects come to lie is chance


@glibc
@pytest.mark.parametrize(
    ("tunables", "told_of"),
    [("", 680), (SPARING, 190), (f"{SPARING}:glibc.malloc.perturb=1", 190), (f"{SPARING}7", 680)],
)
def test_gaps_are_told_for_the_heap_the_process_began_with(tunables: str, told_of: int) -> None:
    program = (
        "import os; os.environ['GLIBC_TUNABLES'] = ''; from veneer.training.allocator import gaps; "
        "print(gaps(1000, 1000))"
    )
    assert told(program, tunables) == [told_of]


@glibc
def test_few_shapes_products_are_kept_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    environment = sparing_environment()
    assert environment is not None
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert environment["LRU_CACHE_CAPACITY"] == "7"


@pytest.mark.parametrize("already", [False, True])
def test_what_is_there_is_left_out_by_the_collector(already: bool) -> None:
    there = [[] for _ in range(3)]  # type: ignore[var-annotated]
    try:
        if already:
            gc.freeze()
        with kept_memory():
            assert not {id(each) for each in there} & {id(each) for each in gc.get_objects()}
            cycle = Cycle()
            cycle.own = cycle
            gone = weakref.ref(cycle)
            del cycle
            gc.collect()
            assert gone() is None
        assert bool(gc.get_freeze_count()) == already
    finally:
        gc.unfreeze()


class Cycle:
    """Refers to itself."""

    own: Cycle
