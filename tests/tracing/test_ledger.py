"""The ledger: on shapes alone it says what it says of real tensors, and what autograd really keeps."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter

import pytest
import torch

import veneer
from helpers import tiny_llama
from veneer.kernels import cross_entropy
from veneer.kernels.attention import attention
from veneer.kernels.cross_entropy import cross_entropy_sum
from veneer.kernels.native import tiles
from veneer.methods import method_class
from veneer.tasks.causal_lm import CausalLM
from veneer.tracing import Ledger, shapes_only
from veneer.training.rehearsal import rehearsing

ROWS, TOKENS = 2, 12


def run(method: str) -> tuple[Ledger, int]:
    """A forward and backward of the tiny decoder: the books, and the bytes autograd keeps between the two."""
    base = veneer.Base(tiny_llama(), None)
    adapter = base.attach(method_class(method)(), "a", loading=True).train()
    batch = CausalLM().blank(ROWS, TOKENS)
    there = (*base.model.parameters(), *base.model.buffers(), *adapter.parameters(), *batch.values())
    own = {tensor.untyped_storage() for tensor in there}
    saved: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            saved[id(storage)] = storage
        return tensor

    ledger = Ledger(128)
    with ledger:
        ledger.enter(base.model.parameters(), "weights")
        kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with ledger.phase("forward", "activations"), kept:
            outcome = CausalLM().outcome(adapter, batch)
        after = ledger.alive.get("activations", 0) + ledger.alive.get("logits", 0)
        still = sum(storage.nbytes() for storage in saved.values())
        assert 0.8 * after <= still <= after  # the rest are outputs and what hooks hold
        with ledger.phase("backward", "workspace"):
            outcome.loss.backward()
    return ledger, after


@pytest.mark.parametrize("method", ["lora", "ia3", "houlsby", "full"])
def test_shapes_alone_tell_what_real_tensors_tell(method: str) -> None:
    real, kept = run(method)
    with rehearsing(ROWS * TOKENS, ROWS * (TOKENS - 1)):
        dry, dry_kept = run(method)
    assert kept > 10_000
    assert dry_kept == pytest.approx(kept, rel=0.03)  # the labelled of zeros are chosen by numbers
    for phase in ("forward", "backward"):
        assert sum(dry.peaks[phase].values()) == pytest.approx(sum(real.peaks[phase].values()), rel=0.05), phase
    assert sum(work.flops for work in dry.work) == pytest.approx(sum(work.flops for work in real.work), rel=0.02)


def test_nothing_is_held_on_shapes() -> None:
    with shapes_only():
        huge = torch.zeros(1 << 40)
        assert huge.nbytes == 1 << 42


def test_what_dies_is_struck_out() -> None:
    ledger = Ledger()
    with shapes_only(), ledger, ledger.phase("one", "workspace"):
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second.view(10, 100)  # no storage of its own
    assert ledger.alive["workspace"] == 4000
    assert ledger.peaks["one"]["workspace"] == 8000
    del second, third
    assert ledger.alive["workspace"] == 0


def test_questions_have_the_usual_answers() -> None:
    with shapes_only(tokens=24, labelled=5):
        mask = torch.zeros(2, 12, dtype=torch.bool)
        assert torch.randn(2, 12, 7)[mask].shape == (5, 7)
        assert torch.randn(8)[torch.zeros(8, dtype=torch.bool)].shape == (4,)
        assert bool(mask.all()) is True
        assert torch.equal(mask, mask)
        assert torch.randint(9, (6,)).unique().shape == (6,)


def _looped(short: bool) -> Ledger:
    """The kernels that go by parts, with rows left over at the end of each loop."""
    ledger = Ledger()
    with shapes_only(), ledger, ledger.shortened() if short else contextlib.nullcontext():
        states = [torch.empty(70, 8, 500, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        hidden, weight = torch.empty(1999, 16, requires_grad=True), torch.empty(32000, 16)
        with ledger.phase("all", "workspace"):
            attention(*states, None, causal=True, scale=0.3).sum().backward()
            loss, _ = cross_entropy_sum(hidden, weight, None, torch.zeros(1999, dtype=torch.long))
            loss.backward()
    return ledger


def test_two_rounds_tell_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_SUMS", 200 * 32)
    short, whole = _looped(True), _looped(False)
    assert Counter(short.work) == Counter(whole.work)
    assert short.peaks == whole.peaks
    assert len(short.moments["all"]) < len(whole.moments["all"]) / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_of_the_dtype_they_compute_in(dtype: torch.dtype) -> None:
    ledger = Ledger()
    with shapes_only(), ledger, ledger.phase("all", "workspace"):
        hidden, weight = torch.empty(64, 32, dtype=dtype, requires_grad=True), torch.empty(320, 32, dtype=dtype)
        cross_entropy_sum(hidden, weight, None, torch.zeros(64, dtype=torch.long))[0].backward()
    products = [each for each in ledger.work if each.flops]
    assert products
    assert {each.dtype for each in products} == {dtype}
    assert {each.ours for each in products} == {tiles.there()}
