"""Telling an adapter what its method asks of each row: which task it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.adapters import Adapter
from veneer.data.formats import TASK


@contextlib.contextmanager
def conditioned(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Run ``model`` inside the block on a batch of these rows; those without a task are told nothing."""
    adapter = getattr(model, "module", model)  # DDP wraps
    if not (isinstance(adapter, Adapter) and adapter.method.conditioned and any(row.get(TASK) for row in rows)):
        yield
        return
    with adapter.conditioned([row.get(TASK) for row in rows]):
        yield


def names_of(tasks: Sequence[Any]) -> list[str]:
    """The names in a `task` column, sorted."""
    return sorted({task for task in tasks if isinstance(task, str)})
