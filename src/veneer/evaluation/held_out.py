"""Held-out evaluation of an adapter, with the plain base beside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.adapters import Adapter
from veneer.data import read
from veneer.evaluation.columns import mapping
from veneer.evaluation.forgetting import Forgetting
from veneer.evaluation.forgetting import forgetting as measure_forgetting
from veneer.evaluation.scores import Score
from veneer.tasks import Prepared, Task, adapter_task
from veneer.tasks.measuring import measure

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        task: the task's name.
        rows: rows evaluated.
        adapter: metric -> score of the adapter.
        compared_with: what stands beside it: ``plain base``, or ``commonest answer`` for tasks a plain base can't do.
        base: metric -> score of that, or None.
        by_task: the adapter's scores for each value of the rows' ``task`` column, if they have one.
        predictions: the adapter's, in the order of the rows.
        base_predictions: the base's, likewise, or None.
        truncated: rows cut at the task's `max_length`.
        dropped: rows left out, with nothing within it to be evaluated on.
        unfinished: answers that were cut at the most tokens allowed.
        seconds: it took.
        forgetting: what was forgotten of what the base knew, if that was measured.
    """

    task: str
    rows: int
    adapter: dict[str, Score]
    compared_with: str | None
    base: dict[str, Score] | None
    by_task: dict[str, dict[str, Score]]
    predictions: list[dict[str, Any]]
    base_predictions: list[dict[str, Any]] | None
    truncated: int
    dropped: int
    unfinished: int
    seconds: float
    forgetting: Forgetting | None = None

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON, without the predictions."""

        def scores(of: Mapping[str, Score] | None) -> dict[str, Any] | None:
            return None if of is None else {name: vars(score) for name, score in of.items()}

        return {
            "task": self.task,
            "rows": self.rows,
            "adapter": scores(self.adapter),
            "compared_with": self.compared_with,
            "base": scores(self.base),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "unfinished": self.unfinished,
            "by_task": {name: scores(of) for name, of in self.by_task.items()},
            "seconds": self.seconds,
            "forgetting": self.forgetting.plain() if self.forgetting else None,
        }


def evaluate(
    adapter: Adapter,
    data: Any,
    *,
    task: Task | None = None,
    base: bool = True,
    limit: int | None = None,
    batch_size: int = 16,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    forgetting: bool = True,
    retention: Sequence[str | Path] = (),
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Evaluate an adapter on held-out rows.

    Args:
        adapter: what to evaluate.
        data: anything `veneer.data.read` takes.
        task: by default the one it was trained for.
        base: whether to evaluate the plain base, too.
        limit: evaluate a random choice of this many rows.
        batch_size: rows a batch.
        split: of a hub or catalogue data set.
        columns: our name of a column -> its name in the data; by default as in training.
        forgetting: whether to measure what was forgotten, too, on general texts: `veneer.evaluation.forgetting`.
        retention: files of your own to measure it on besides.
        progress: told what is being done.
        options: of the task's predictions, e.g. ``max_new_tokens``.

    Raises:
        DataError: the data cannot be read or doesn't suit the task.
    """
    started = time.perf_counter()
    task = task or adapter_task(adapter)
    rows = read(data, split=split, columns=mapping(adapter, data, split, columns))
    task.check_format(rows)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(limit))
    adapter.eval()
    prepared = task.prepare(rows, adapter.base.tokenizer)
    progress(f"adapter: {len(rows)} rows")
    ours = _evaluated(task, adapter, adapter, rows, prepared, batch_size, options)
    theirs: _Evaluated | None = None
    if base and task.plain_base:
        progress(f"plain base: {len(rows)} rows")
        with adapter.base.using(None):
            theirs = _evaluated(task, adapter, adapter.base.model, rows, prepared, batch_size, options)
    elif base:
        theirs = _Evaluated({}, task.commonest(list(rows)), [])
    if forgetting:
        progress("what was forgotten: general texts")
    forgotten = measure_forgetting(adapter, task=task, own=retention) if forgetting else None
    return Report(
        task=task.name,
        rows=len(rows),
        adapter=ours.scores(),
        compared_with=("plain base" if task.plain_base else "commonest answer") if base else None,
        base=theirs.scores() if theirs else None,
        by_task=_by_task(rows, ours.by_row),
        predictions=ours.predictions,
        base_predictions=theirs.predictions if theirs else None,
        truncated=prepared.truncated,
        dropped=prepared.dropped,
        unfinished=sum(not answer.get("finished", True) for answer in ours.predictions),
        seconds=time.perf_counter() - started,
        forgetting=forgotten,
    )


@dataclass(frozen=True)
class _Evaluated:
    """Metrics over all items at once, metrics by row, and predictions."""

    overall: dict[str, float]
    by_row: dict[str, list[float]]
    predictions: list[dict[str, Any]]

    def scores(self) -> dict[str, Score]:
        overall = {name: Score(value) for name, value in self.overall.items()}
        return overall | {name: Score.of(values) for name, values in self.by_row.items()}


def _evaluated(
    task: Task,
    adapter: Adapter,
    model: nn.Module,
    rows: Dataset,
    prepared: Prepared,
    batch_size: int,
    options: Mapping[str, Any],
) -> _Evaluated:
    overall = measure(task, model, adapter.base, prepared, batch_size)
    everything = list(rows)
    if not all(task.has_answer(row) for row in everything):
        return _Evaluated(overall, {}, [])
    order = sorted(range(len(rows)), key=lambda index: len(str(everything[index])))  # like lengths: less padding
    ordered = [everything[index] for index in order]
    answers = task.predict(model, adapter.base, ordered, batch_size=batch_size, **options)
    predictions: list[dict[str, Any]] = [{}] * len(rows)
    for index, answer in zip(order, answers, strict=True):
        predictions[index] = answer
    return _Evaluated(overall, task.score(everything, predictions), predictions)


def _by_task(rows: Dataset, by_row: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Score]]:
    if "task" not in rows.column_names:
        return {}
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(rows["task"]):
        places[str(name)].append(index)
    return {
        name: {metric: Score.of([of[index] for index in indices]) for metric, of in by_row.items()}
        for name, indices in places.items()
    }
