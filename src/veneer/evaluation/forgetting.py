"""What an adapter has forgotten: on texts and tasks its adaptation never saw, beside the plain base.

For language models

    loss       on general texts, and on good answers to general prompts: adapter − base, in nats a token
    kl         KL(p_base ‖ p_adapter) of the next token there, averaged over tokens (Kullback & Leibler 1951):
               0 where the adapter leaves everything as it was, whether that was right or not
    accuracy   on easy questions with four answers each, chosen by the likelihood of the whole answer

For classifiers, whose base has no answers of its own: what is left of its features (`veneer.evaluation.features`).

An adapter forgets only while it is on; what is measured is what it takes to leave it on for everything. It depends on
how far a run learned: compare two methods where they have learned equally much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from veneer.adapters import Adapter
from veneer.data import read
from veneer.errors import DataError
from veneer.evaluation import retention
from veneer.evaluation.by_row import beside_base, by_row
from veneer.evaluation.features import kept
from veneer.evaluation.retention import PROMPTS, QUESTIONS, TEXTS, Question
from veneer.evaluation.scores import Score
from veneer.tasks import Prepared, Task, adapter_task

if TYPE_CHECKING:
    from datasets import Dataset

LOSS, KL, ACCURACY, SIMILARITY, RETRIEVAL = "loss", "kl", "accuracy", "similarity", "retrieval"
HIGHER_IS_WORSE = (LOSS, KL)
"""Measures that rise with forgetting; the others fall."""
_ROOM = 256
"""Tokens that hold the shipped texts."""


@dataclass(frozen=True)
class Change:
    """A measure on one set, before and after.

    Attributes:
        data: what it was measured on.
        rows: how many.
        measure: ``loss``, ``kl`` (nats a token), ``accuracy``, ``similarity``, ``retrieval``.
        base: of the plain base.
        adapter: of the adapter.
        change: adapter − base, paired by row, with its interval.
    """

    data: str
    rows: int
    measure: str
    base: float
    adapter: float
    change: Score

    @property
    def forgotten(self) -> Score:
        """The change such that more is worse."""
        if self.measure in HIGHER_IS_WORSE:
            return self.change
        low, high = self.change.low, self.change.high
        return Score(-self.change.value, None if high is None else -high, None if low is None else -low)


@dataclass(frozen=True)
class Forgetting:
    """What was forgotten.

    Attributes:
        changes: the most telling one first; none if it isn't defined.
        undefined: why it isn't, or None.
    """

    changes: tuple[Change, ...]
    undefined: str | None = None

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"changes": [asdict(change) for change in self.changes], "undefined": self.undefined}


def forgetting(
    adapter: Adapter,
    *,
    task: Task | None = None,
    own: Sequence[str | Path] = (),
    brief: bool = False,
    batch_size: int = 16,
) -> Forgetting:
    """Measure what an adapter has forgotten.

    Args:
        adapter: as it is now.
        task: by default the one it was trained for.
        own: files of your own besides the shipped set, with ``text``, or ``prompt`` and ``completion``.
        brief: the most telling measure alone, on the shipped texts; takes a tenth of the time.
        batch_size: rows a batch.

    Raises:
        DataError: a file of yours cannot be read, or has other columns.
    """
    task = _roomy(task or adapter_task(adapter), adapter)
    sets = retention.own(own)
    adapter.eval()
    if (why := adapter.method.asks) is not None:
        return Forgetting((), f"{adapter.method.name} {why}")
    if not task.plain_base:
        return Forgetting(_of_features(adapter, task, {TEXTS: retention.texts(), **sets})[: 1 if brief else None])
    if brief:
        return Forgetting(tuple(_of_language(adapter, task, TEXTS, retention.texts(), batch_size)[:1]))
    changes: list[Change] = []
    for name, rows in {TEXTS: retention.texts(), PROMPTS: retention.prompts(), **sets}.items():
        changes += _of_language(adapter, task, name, rows, batch_size)
    changes += _of_questions(adapter, task, retention.questions(), batch_size)
    if not changes:
        return Forgetting((), f"general texts don't fit into {task.max_length} tokens")
    order = [KL, LOSS, ACCURACY]
    return Forgetting(tuple(sorted(changes, key=lambda change: order.index(change.measure))))


def _roomy(task: Task, adapter: Adapter) -> Task:
    """The task with room for general texts, where it was trained for short ones."""
    there = getattr(adapter.base.model.config, "max_position_embeddings", None) or _ROOM
    return task.model_copy(update={"max_length": max(task.max_length, min(_ROOM, there - adapter.positions))})


def _change(data: str, measure: str, base: Sequence[float], ours: Sequence[float]) -> Change:
    """Of one value a row, paired."""
    apart = Score.of_items([after - before for after, before in zip(ours, base, strict=True)], [1.0] * len(base))
    return Change(data, len(base), measure, fmean(base), fmean(ours), apart)


def _of_language(adapter: Adapter, task: Task, name: str, rows: Dataset, batch_size: int) -> list[Change]:
    prepared = task.prepare(rows, adapter.base.tokenizer, allow_none=True)
    if not len(prepared.examples):
        return []
    plain, ours, apart = beside_base(task, adapter, prepared, len(rows), batch_size)
    items = plain.items.tolist()
    rise = Score.of_items((ours.loss - plain.loss).tolist(), items)
    base = float(plain.loss.sum() / plain.items.sum())
    divergence = Score.of_items(apart.tolist(), items)
    return [
        Change(name, len(rows), KL, 0.0, divergence.value, divergence),
        Change(name, len(rows), LOSS, base, base + rise.value, rise),
    ]


def _of_questions(adapter: Adapter, task: Task, asked: Sequence[Question], batch_size: int) -> list[Change]:
    answers = [{"prompt": q.question, "completion": choice} for q in asked for choice in q.choices]
    prepared = task.prepare(read(answers), adapter.base.tokenizer, allow_none=True)
    if prepared.dropped or prepared.truncated:  # an answer that is not there in full would be the likeliest
        return []
    with adapter.base.using(None):
        base = _right(task, adapter, adapter.base.model, asked, prepared, batch_size)
    ours = _right(task, adapter, adapter, asked, prepared, batch_size)
    return [_change(QUESTIONS, ACCURACY, base, ours)]


def _right(
    task: Task, adapter: Adapter, model: Any, asked: Sequence[Question], prepared: Prepared, batch_size: int
) -> list[float]:
    """1 for each question whose right answer is the likeliest as a whole, its end included; else 0."""
    width = len(asked[0].choices)
    losses = by_row(task, model, adapter.base, prepared, len(asked) * width, batch_size).loss.reshape(-1, width)
    return [float(row.argmin() == question.answer) for row, question in zip(losses, asked, strict=True)]


def _of_features(adapter: Adapter, task: Task, sets: dict[str, Dataset]) -> tuple[Change, ...]:
    changes = []
    for name, rows in sets.items():
        if "text" not in rows.column_names:
            raise DataError(
                f"The retention set {name!r} has {', '.join(rows.column_names)}; for {task.name} it takes `text`."
            )
        found = kept(adapter, rows["text"][:], task.max_length)
        changes.append(_change(name, SIMILARITY, [1.0] * len(rows), found.similarity))
        if found.base:
            changes.append(_change(name, RETRIEVAL, found.base, found.adapter))
    return tuple(sorted(changes, key=lambda change: change.measure != SIMILARITY))
