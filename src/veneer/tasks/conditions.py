"""Telling an adapter what its method asks of each row: which task it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.adapters import Adapter
from veneer.data.formats import TASK, task_told

if TYPE_CHECKING:
    from datasets import Dataset


@contextlib.contextmanager
def conditioned(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Run ``model`` inside the block on a batch of these rows; those without a task are told nothing."""
    adapter = getattr(model, "module", model)  # DDP wraps
    told = [task_told(row.get(TASK)) for row in rows]
    if not (isinstance(adapter, Adapter) and adapter.method.conditioned and any(task is not None for task in told)):
        yield
        return
    with adapter.conditioned(told):
        yield


def names_of(rows: Dataset) -> list[str] | None:
    """The names in the rows' `task` column, sorted: none of vectors; None if it isn't there or says nothing."""
    told = [task_told(task) for task in rows[TASK][:]] if TASK in rows.column_names else []
    if all(task is None for task in told):
        return None
    return sorted({task for task in told if isinstance(task, str)})
