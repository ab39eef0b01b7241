"""A rehearsed step: few layers tell of many, and the real step holds what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from veneer.bases.architecture import Architecture, architecture
from veneer.methods import method_class
from veneer.tracing import Moment, shapes_only
from veneer.training.rehearsal import Batch, Rehearsal, Step, attached, deepened, task_for

BATCH = Batch(rows=2, tokens=24)


def tiny(layers: int = 7) -> Architecture:
    """A narrow Llama."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Architecture("tiny", config, "AutoModelForCausalLM", torch.float32)


def rehearsed(method: str, settings: dict[str, Any], **changes: Any) -> tuple[Rehearsal, int]:
    """A rehearsal and the adapter's bytes."""
    found = tiny()
    rehearsal = Rehearsal(found, method_class(method)(**settings), task_for(found), torch.float32, **changes)
    with shapes_only():
        adapter = attached(found, rehearsal.method, rehearsal.task, torch.float32)
    return rehearsal, sum(each.nbytes for each in (*adapter.parameters(), *adapter.buffers()))


def total(step: Step) -> dict[str, float]:
    """Bytes of each phase."""
    return {phase: sum(kinds.values()) for phase, kinds in step.phases.items()}


@pytest.mark.parametrize(
    ("method", "settings", "changes"),
    [
        ("lora", {}, {}),
        ("lora", {"layers": "-2:"}, {}),
        ("ia3", {}, {}),
        ("prefix", {}, {}),
        ("partial", {}, {}),
        ("full", {}, {}),
        ("lora", {}, {"checkpointing": True}),
    ],
)
def test_few_layers_tell_of_many(method: str, settings: dict[str, Any], changes: dict[str, Any]) -> None:
    rehearsal, held = rehearsed(method, settings, **changes)
    along, direct = rehearsal.step(BATCH, held), rehearsal._traced(7, BATCH)
    assert along.flops == pytest.approx(direct.flops, rel=1e-6)
    # the gradient of a slice of what prefixes have for all layers at once is as large as the whole: no line
    assert along.made == pytest.approx(direct.made, rel=0.05 if method == "prefix" else 1e-6)
    assert along.memory["total"] == pytest.approx(direct.memory["total"], rel=0.02)
    assert along.phases[""]["adapter"] == pytest.approx(held)


@pytest.mark.parametrize("layers", [8, pytest.param(22, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "settings"), [("ptuning", {}), ("tokens", {"tokens": [5]})])
def test_the_moment_of_the_peak_may_change_with_depth(method: str, settings: dict[str, Any], layers: int) -> None:
    found = architecture("tinyllama-1.1b").with_layers(layers)
    rehearsal = Rehearsal(found, method_class(method)(**settings), task_for(found), found.dtype)
    with shapes_only():
        adapter = attached(found, rehearsal.method, rehearsal.task, found.dtype)
    held = sum(each.nbytes for each in (*adapter.parameters(), *adapter.buffers()))
    batch = Batch(rows=2, tokens=512)
    along, direct = rehearsal.step(batch, held), rehearsal._traced(layers, batch)
    assert along.memory["total"] == pytest.approx(direct.memory["total"], rel=0.01)
    assert along.memory["workspace"] == pytest.approx(direct.memory["workspace"], rel=0.01)


@pytest.mark.parametrize(("off", "depths"), [(40, [2, 3]), (40_000, [2, 3, 4, 5, 8, 9])])
def test_a_rounded_share_needs_no_more_layers(off: int, depths: list[int]) -> None:
    seen = []

    def traced(layers: int) -> Step:
        seen.append(layers)
        return Step({}, {}, {"": [Moment("", 0, {"adapter": 10**6 * layers})]})

    deepened(traced, tiny(22), 22 * 10**6 + off)
    assert seen == depths


def test_checkpointing_holds_less_and_does_more() -> None:
    plain, held = rehearsed("lora", {})
    again = replace(plain, checkpointing=True)
    first, second = plain.step(BATCH, held), again.step(BATCH, held)
    assert second.memory["activations"] < first.memory["activations"] / 2
    assert second.flops > 1.2 * first.flops


def test_more_rows_hold_more() -> None:
    rehearsal, held = rehearsed("lora", {})
    one, two = (rehearsal.step(Batch(rows, 24), held) for rows in (2, 4))
    assert two.memory["activations"] == pytest.approx(2 * one.memory["activations"], rel=0.1)
    assert two.memory["weights"] == one.memory["weights"]


def test_the_optimizer_holds_two_moments() -> None:
    rehearsal, held = rehearsed("lora", {})
    assert rehearsal.step(BATCH, held).memory["optimizer"] == pytest.approx(2 * held, rel=0.01)
