"""What is shared by forms that multiply by tiles (Intel AMX; `products.h`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from veneer.kernels.native import build
from veneer.kernels.native.operations import KINDS

SIDE = 32
"""Rows and columns that are multiplied at a time; depths are multiples of it."""
WIDTHS = 8192
"""Of a map in bfloat16, in and out together, beyond which torch's products are as fast."""
PARTS = {torch.bfloat16: 1, torch.float32: 3}
"""Of dtypes that can be multiplied: as sums of how many bfloat16."""


def there() -> bool:
    """Whether there are such forms here: if processor and system offer tiles."""
    return build.there() and _offered()


@functools.cache
def _offered() -> bool:
    loaded = build.library()
    if loaded is None:
        return False
    there = loaded["products_there"]
    there.restype = KINDS["n"]
    return bool(there())  # which also asks the system for them: without that a process that uses them is ended


@functools.cache
def function(name: str, kinds: str) -> Callable[..., int]:
    """A function in C, which takes arguments of these `KINDS`.

    Raises:
        RuntimeError: there are no tiles here.
    """
    loaded = build.library()
    if loaded is None or not _offered():
        raise RuntimeError(f"{name} needs a processor and a system with tiles (Intel AMX).")
    found = loaded[name]
    found.argtypes = [KINDS[each] for each in kinds]
    found.restype = KINDS["n"] if name.endswith("work") else None
    return found


def ordinary(tensor: Tensor) -> bool:
    """Whether it is no subclass with numbers of its own kind."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def padded(width: int) -> int:
    """The next multiple of `SIDE`."""
    return -(-width // SIDE) * SIDE


def work(like: Tensor, name: str, sizes: Sequence[int], *more: int) -> Tensor:
    """Room for what each thread lays out of such numbers, as much as the function of this name says; it is told sizes,
    parts and what more there is."""
    kinds = "n" * len(sizes) + "i" * (1 + len(more))
    room = function(name, kinds)(*sizes, PARTS[like.dtype], *more)
    return like.new_empty(torch.get_num_threads(), room, dtype=torch.bfloat16)
