"""Two hundred steps with the faster forms are two hundred steps of the plain ones."""

from __future__ import annotations

import pytest
import torch
from benchmarks.texts import prose
from datasets import Dataset

import veneer
from veneer.bases.fast import Fast
from veneer.kernels import attention as kernel
from veneer.tasks.causal_lm import CausalLM

STEPS, ROWS = 200, 2


def losses(*, fast: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of each step, with the model's own loss where not ``fast``."""
    torch.manual_seed(0)
    base, task = veneer.load_base("smollm2-135m-instruct", dtype="float32"), CausalLM(max_length=40)
    adapter = base.attach(veneer.LoRA(rank=16), "a", seed=0)
    adapter.train()
    examples = task.prepare(Dataset.from_list(prose(20)[0]), base.tokenizer).examples
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-4, fused=fast)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "GAINS", {torch.float32})
        if not fast:
            patch.setattr(Fast, "on", lambda self: lambda: None)
        for step in range(STEPS):
            batch = task.collate([examples[(ROWS * step + row) % len(examples)] for row in range(ROWS)], base.tokenizer)
            optimizer.zero_grad()
            if fast:
                outcome = task.outcome(adapter, batch)
                loss = outcome.loss / outcome.items
            else:
                loss = adapter(**batch).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.slow
def test_loss_curves_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = (losses(fast=which, monkeypatch=monkeypatch) for which in (False, True))
    assert plain[-20:].mean() < 0.95 * plain[:20].mean()
    difference = (fast - plain).abs() / plain
    assert not torch.equal(fast, plain)  # they were computed in two ways
    assert difference[:20].max() < 1e-5
    assert difference.max() < 1e-3
