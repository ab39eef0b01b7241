"""Loops in steps, whose rounds do the same to tensors of the same shapes.

Where operations are only counted, on tensors without numbers, two rounds tell of all: the second, which finds what the
first one left, is what every later one is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Repeat = Callable[[], Callable[[int], None]]
"""Called before a round; what it gives is called after that, with how many times more the round counts."""
_repeat: ContextVar[Repeat | None] = ContextVar("repeat", default=None)


def in_steps(length: int, step: int) -> Iterator[int]:
    """``range(0, length, step)``; of the whole steps the first two alone inside `counting`."""
    whole, repeat = length // step, _repeat.get()
    if repeat is None or whole < 3:
        yield from range(0, length, step)
        return
    yield 0
    again = repeat()
    yield step
    again(whole - 2)
    yield from range(whole * step, length, step)


@contextlib.contextmanager
def counting(repeat: Repeat) -> Iterator[None]:
    """Inside the block whole rounds are counted, not done: tensors must have no numbers."""
    before = _repeat.set(repeat)
    try:
        yield
    finally:
        _repeat.reset(before)
