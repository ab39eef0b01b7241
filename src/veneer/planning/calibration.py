"""How fast this machine is: a few products and element-wise operations, and a small step, timed in some seconds.

Operations in a step take longer than alone, over and over: what they read was written long ago, threads wait for each
other, and Python runs between them. By how much differs between machines (1.02 to 2.07 was seen), so a step of LoRA on
two layers is timed, too, and told by its operations: the ratio is the machine's *pace*.

They are timed once in each process, and not kept for others: the same processor can be nearly twice as fast an hour
later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor

from veneer.bases.architecture import Architecture
from veneer.kernels.native import product, tiles
from veneer.methods.lora import LoRA
from veneer.planning.machine import Machine, Products, Rates
from veneer.tasks.causal_lm import CausalLM
from veneer.training.allocator import kept_memory
from veneer.training.preflight import available_memory
from veneer.training.rehearsal import Batch, Rehearsal, attached, blank

_PRODUCTS = ((1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576), (1024, 576, 16), (1024, 16, 576), (512, 576, 8192))
"""[n, in] × [in, out], as a step has them: whole maps, thin factors, a vocabulary's chunk."""
_WHOLE = [each for each in _PRODUCTS if min(each) > 16]
"""Thin ones have forms of their own among ours."""
_SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_BATCH = Batch(rows=4, tokens=256)
"""Layers of SmolLM2-135M, and what a step gives them."""
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
    found = Machine(_name(), memory, rates, _overhead(), None, measured=True, heap=True)
    return replace(found, paces={str(each).removeprefix("torch."): _pace(each, threads, found) for each in dtypes})


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


_paces: dict[tuple[torch.dtype, int], float] = {}


def _pace(dtype: torch.dtype, threads: int, alone: Machine) -> float:
    """Of a step in this dtype: its seconds by those of its operations."""
    if (dtype, threads) not in _paces:
        config = transformers.LlamaConfig(**_SIZES)
        rehearsal = Rehearsal(Architecture("", config, "AutoModelForCausalLM", dtype), LoRA(), CausalLM(), dtype)
        told = alone.seconds(rehearsal.step(_BATCH, 0).work)
        with torch.random.fork_rng(devices=[]):
            _paces[dtype, threads] = _seconds_of_a_step(rehearsal) / told
    return _paces[dtype, threads]


def _seconds_of_a_step(rehearsal: Rehearsal) -> float:
    adapter = attached(rehearsal.architecture, rehearsal.method, rehearsal.task, rehearsal.dtype).train()
    learned = [each for each in adapter.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, fused=True)
    inputs, times = blank(rehearsal.task, rehearsal.architecture, _BATCH), []
    with kept_memory():
        for _ in range(_ROUNDS + 2):
            began = time.perf_counter()
            rehearsal.loss(adapter, inputs).backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


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
