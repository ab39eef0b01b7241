"""A process for each thing measured, veneer's and its peers', begun as the command ``veneer`` begins."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar
from unittest import mock

from veneer.training.allocator import sparing_environment

T = TypeVar("T")


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """Processes that start inside begin with the heap that `veneer train` has."""
    with mock.patch.dict(os.environ, sparing_environment() or {}):
        yield


def alone(function: Callable[..., T], *arguments: object) -> T:
    """What it returns, called in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with sparing(), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()
