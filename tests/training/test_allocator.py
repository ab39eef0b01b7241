"""Freed memory is kept while training goes on, and only then."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_is_kept_and_given_back() -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, after = map(int, told.split())
    assert kept > 100e6
    assert after < 10e6
