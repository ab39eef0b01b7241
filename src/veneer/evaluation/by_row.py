"""Loss and hits of each held-out row, and how far an adapter is from its base there.

Per row, because only that allows intervals over rows and paired comparisons. Sums, so that rows of uneven length can
be weighted by their items (labelled tokens; a row each in classification).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from veneer.adapters import Adapter, Base
from veneer.tasks import Prepared, Task
from veneer.tasks.base import Scores
from veneer.tasks.conditions import conditioned
from veneer.training.distillation import divergence

Values = NDArray[numpy.float64]


@dataclass(frozen=True)
class ByRow:
    """Sums over the items of each row, ``[rows]``; a row nothing was left of has no items.

    Attributes:
        items: how many.
        loss: their losses, in nats.
        correct: how many of them came out right.
    """

    items: Values
    loss: Values
    correct: Values


def by_row(task: Task, model: nn.Module, base: Base, prepared: Prepared, rows: int, batch_size: int = 8) -> ByRow:
    """Loss and hits of ``model`` (an adapter, or the plain base) on each of so many rows."""
    sums = numpy.zeros((3, rows))
    for batch, sizes, owners in _batches(task, base, prepared, batch_size):
        with torch.no_grad(), conditioned(model, batch.examples):
            scores = task.scores(model, batch.inputs)
            for part, row in zip(_parts(sizes), owners, strict=True):
                sums[:, row] += _told(scores, part)
    return ByRow(*sums)


def beside_base(
    task: Task, adapter: Adapter, prepared: Prepared, rows: int, batch_size: int = 8
) -> tuple[ByRow, ByRow, Values]:
    """The plain base and the adapter on each row, and KL(base ‖ adapter) summed over the items of each, in nats."""
    base = adapter.base
    sums, apart = numpy.zeros((2, 3, rows)), numpy.zeros(rows)
    for batch, sizes, owners in _batches(task, base, prepared, batch_size):
        with torch.no_grad():
            with base.using(None):
                plain = task.scores(base.model, batch.inputs)
            ours = task.scores(adapter, batch.inputs)
            for part, row in zip(_parts(sizes), owners, strict=True):
                sums[0, :, row] += _told(plain, part)
                sums[1, :, row] += _told(ours, part)
                student, teacher = (scores.logits(scores.features[part]).float() for scores in (ours, plain))
                apart[row] += float(divergence(student, teacher, "forward"))
    return ByRow(*sums[0]), ByRow(*sums[1]), apart


@dataclass(frozen=True)
class _Batch:
    examples: Sequence[Mapping[str, Any]]
    inputs: dict[str, Tensor]


def _batches(
    task: Task, base: Base, prepared: Prepared, batch_size: int
) -> Iterator[tuple[_Batch, list[int], list[int]]]:
    """Batches of examples of like length, the number of items in each example, and its row."""
    examples = prepared.examples
    examples = examples.select(torch.tensor(examples["length"][:]).argsort(stable=True).tolist())
    for start in range(0, len(examples), batch_size):
        chosen = list(examples.select(range(start, min(start + batch_size, len(examples)))))
        inputs = {name: value.to(base.device) for name, value in task.collate(chosen, base.tokenizer).items()}
        sizes = [task.items(task.collate([example], base.tokenizer)) for example in chosen]
        yield _Batch(chosen, inputs), sizes, [example["row"] for example in chosen]


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Where the items of each example stand among those of the batch."""
    ends = numpy.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _told(scores: Scores, part: slice) -> tuple[float, float, float]:
    logits, targets = scores.logits(scores.features[part]).float(), scores.targets[part]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return float(len(targets)), float(loss), float((logits.argmax(-1) == targets).sum())
