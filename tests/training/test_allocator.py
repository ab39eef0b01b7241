"""Freed memory is kept while training goes on, and only then."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from veneer.training.allocator import kept_memory

def pages(times=4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        [torch.empty(4 << 20).fill_(1.0) for _ in range(8)]  # as many activations, freed together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

pages(1)
before = held()
with kept_memory():
    pages(1)
    inside, kept = pages(), held() - before
print(inside, kept, held() - before, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_is_kept_and_given_back() -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    inside, kept, after, outside = map(int, told.split())
    assert inside < 1000
    assert kept > 120e6
    assert after < 10e6
    assert outside > 10 * max(inside, 100)
