"""A model's loss and metrics over prepared rows."""

from __future__ import annotations

import torch
from torch import nn

from veneer.adapters import Base
from veneer.tasks.base import Prepared, Task
from veneer.tasks.conditions import conditioned


def measure(task: Task, model: nn.Module, base: Base, prepared: Prepared, batch_size: int) -> dict[str, float]:
    """Loss and the task's metrics over all items: each weighs the same whatever row it is in."""
    examples = prepared.examples
    examples = examples.select(torch.tensor(examples["length"][:]).argsort(stable=True).tolist())
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            chosen = examples.select(range(start, min(start + batch_size, len(examples))))
            batch = task.collate(list(chosen), base.tokenizer)
            with conditioned(model, list(chosen)):
                outcome = task.outcome(model, {name: value.to(base.device) for name, value in batch.items()})
            sums += torch.tensor([float(outcome.loss), float(outcome.items), float(outcome.correct)])
    loss, items, correct = sums.tolist()
    return {"loss": loss / items, **task.metrics(loss / items, correct / items)}
