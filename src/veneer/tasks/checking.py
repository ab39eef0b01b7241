"""Data as a task sees it: the rows as model inputs, and a report of what was found in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from veneer.adapters import Base
from veneer.data import DataReport, Part, report
from veneer.data.findings import Finding
from veneer.data.report import MAX_TRUNCATED
from veneer.errors import ConfigError
from veneer.tasks.base import Prepared, Task

_LOOKED_AT = 200
"""Rows whose template and ends are checked, evenly spread."""
_MANY = 20_000


@dataclass(frozen=True)
class Checked:
    """Data that was looked at.

    Attributes:
        parts: the rows, with the tokens that were counted, by name.
        report: what was found.
        prepared: the parts' rows as model inputs, by the parts' names; without those that can't be.
    """

    parts: dict[str, Part]
    report: DataReport
    prepared: dict[str, Prepared]


def check_data(
    task: Task,
    base: Base | None,
    parts: Sequence[Part],
    *,
    max_truncated: float = MAX_TRUNCATED,
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Prepare and report on training rows and those held out.

    Args:
        task: what they are for.
        base: whose tokenizer, template and context count; without one, no tokens are counted.
        parts: training first.
        max_truncated: share of a part's rows that may be cut or left out.
        say: told what is being done, if it takes a while.

    Raises:
        ConfigError: the base has no tokenizer.
        DataError: rows have a format the task does not take.
    """
    if base is not None and base.tokenizer is None:
        raise ConfigError(f"{base.name} has no tokenizer; pass one: veneer.Base(model, tokenizer).")
    rows = sum(len(part.rows) for part in parts)
    if rows >= _MANY:
        say(f"Looking at {rows:,} rows ...")
    prepared: dict[str, Prepared] = {}
    seen = []
    for part in parts:
        task.check_format(part.rows)
        unknown = task.unknown_labels(part.rows)
        tokens = None
        if base is not None and not unknown:
            prepared[part.name] = task.prepare(part.rows, base.tokenizer, allow_none=True)
            tokens = prepared[part.name].tokens
        seen.append(replace(part, tokens=tokens, unknown=unknown))
    found = report(seen, max_truncated=max_truncated, context=context_of(base) if base else None)
    faults = _faults(task, base, seen[0]) if base else []
    findings = [*faults, *_nothing(prepared, task), *found.findings]
    return Checked({part.name: part for part in seen}, replace(found, findings=findings), prepared)


def context_of(base: Base) -> int | None:
    """The longest input of a base in tokens, if it says."""
    context: Any = getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _faults(task: Task, base: Base, training: Part) -> list[Finding]:
    rows = len(training.rows)
    some = numpy.unique(numpy.linspace(0, rows - 1, min(rows, _LOOKED_AT)).astype(int))
    faults = task.faults(list(training.rows.select(some)), base.tokenizer)
    return [Finding("error", "template", training.name, f"{fault}.", refused=True) for fault in faults]


def _nothing(prepared: dict[str, Prepared], task: Task) -> list[Finding]:
    message = f"no row has anything to learn within {task.max_length:,} tokens (task.max_length)."
    return [
        Finding("error", "nothing_to_learn", name, message, refused=True)
        for name, part in prepared.items()
        if not len(part.examples)
    ]
