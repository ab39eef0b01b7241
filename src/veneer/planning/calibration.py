"""How fast this machine is: a few products and element-wise operations, timed in some seconds.

They are timed once in each process, and not kept for others: the same processor can be nearly twice as fast an hour
later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import psutil
import torch
from torch import Tensor

from veneer.kernels.native import product, tiles
from veneer.planning.machine import Machine, Products, Rates
from veneer.training.preflight import available_memory

_PRODUCTS = ((1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576), (1024, 576, 16), (1024, 16, 576), (512, 576, 8192))
"""[n, in] × [in, out], as a step has them: whole maps, thin factors, a vocabulary's chunk."""
_WHOLE = [each for each in _PRODUCTS if min(each) > 16]
"""Thin ones have forms of their own among ours."""
_NUMBERS = 1024 * 768
_ROUNDS = 7
_MANY = 100
_CACHES = 64 << 20
"""Bytes that drive everything else out of a processor's caches."""


def this_machine(dtypes: Sequence[torch.dtype]) -> Machine:
    """This machine's processor, measured for these dtypes and float32."""
    threads = torch.get_num_threads()
    rates = {str(each).removeprefix("torch."): _rates(each, threads) for each in (*dtypes, torch.float32)}
    memory = available_memory(torch.device("cpu"))
    return Machine(_name(), memory, rates, _overhead(), None, measured=True, heap=True)


@cache
def _overhead() -> float:
    """Of an operation on a few numbers, with what autograd notes of it."""
    few = torch.ones(8, requires_grad=True)
    return _timed(lambda: [few * few for _ in range(_MANY)]) / _MANY


def _name() -> str:
    return f"this machine ({torch.get_num_threads()} threads, {psutil.virtual_memory().total / 2**30:.0f} GiB)"


@cache
def _rates(dtype: torch.dtype, threads: int) -> Rates:
    """``threads`` is what torch computes with now: with another number rates are others."""
    with torch.no_grad():
        a, b = torch.randn(_NUMBERS).to(dtype), torch.randn(_NUMBERS).to(dtype)
        light = _timed(lambda: a * b) / _NUMBERS
        heavy = _timed(lambda: torch.nn.functional.silu(a)) / _NUMBERS
        drawn = _timed(lambda: torch.empty_like(a).bernoulli_(0.9)) / _NUMBERS
        theirs = _products(dtype, _PRODUCTS, torch.nn.functional.linear)
        few = torch.empty(1, tiles.SIDE, dtype=dtype)
        ours = _products(dtype, _WHOLE, _by_tiles) if product.suits(few, few) else None
    return Rates(theirs, light, max(heavy, light), drawn, ours)


def _by_tiles(x: Tensor, weight: Tensor) -> None:
    product.product(x, weight, None, False, x.new_empty(len(x), len(weight)))


def _products(
    dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], run: Callable[[Tensor, Tensor], object]
) -> Products:
    rows, seconds = [], []
    for n, width, out in shapes:
        x, weight = torch.randn(n, width).to(dtype), torch.randn(out, width).to(dtype)
        rows.append((2 * n * width * out, x.element_size() * (n * width + width * out + n * out)))
        seconds.append(_timed(lambda x=x, weight=weight: run(x, weight)))  # type: ignore[misc]
    return _fitted(np.array(rows, float), np.array(seconds))


def _fitted(work: np.ndarray, seconds: np.ndarray) -> Products:
    """Rate and bandwidth for which the relative errors of all products are least."""
    weighted = work / seconds[:, None]
    costs, *_ = np.linalg.lstsq(weighted, np.ones(len(seconds)), rcond=None)
    if (costs <= 0).any():  # one of both explains all
        return Products(float((work[:, 0] / seconds).max()), float((work[:, 1] / seconds).max()))
    return Products(float(1 / costs[0]), float(1 / costs[1]))


def _timed(run: Callable[[], object]) -> float:
    """Between the time with all operands in caches and that with none: in a step some were written just before, others
    long ago. Medians of some rounds, after two that warm up."""
    elsewhere = torch.zeros(_CACHES, dtype=torch.uint8)
    found = []
    for between in (lambda: None, lambda: elsewhere.add_(1)):
        times = []
        for _ in range(_ROUNDS + 2):
            between()
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times[2:]))
    return statistics.mean(found)
