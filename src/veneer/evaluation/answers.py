"""Batch inference: answers to rows, and a file of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from veneer.adapters import Adapter
from veneer.data.reading import read_raw
from veneer.errors import DataError, OutputError, did_you_mean
from veneer.evaluation.columns import mapping
from veneer.storage import replacing
from veneer.tasks import Task, adapter_task

_CHUNK = 256


def predict(
    adapter: Adapter, rows: Iterable[Mapping[str, Any]], *, task: Task | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Answers to rows, one dict each, in their order.

    Args:
        adapter: what answers.
        rows: with ``prompt``, ``messages`` or ``text``.
        task: by default the one the adapter was trained for.
        options: ``batch_size``; for text also those of transformers' ``generate``.

    Raises:
        DataError: a row has none of the columns the task asks from.
    """
    task = task or adapter_task(adapter)
    adapter.eval()
    done = 0
    for chunk in _chunks(rows):
        for number, row in enumerate(chunk, done + 1):
            if all(row.get(column) is None for column in task.asks_from):
                near = "".join(did_you_mean(column, task.asks_from) for column in row)
                raise DataError(
                    f"Row {number} has {', '.join(row) or 'nothing'}; task {task.name} asks from "
                    f"{' or '.join(task.asks_from)}.{near}"
                )
        done += len(chunk)
        yield from task.predict(adapter, adapter.base, chunk, **options)


def predict_file(
    adapter: Adapter,
    source: str | Path,
    output: str | Path,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Write each row of ``source`` with its answer to ``output`` (``.jsonl`` or ``.csv``), all or nothing.

    Returns:
        How many rows, and how many of the answers were cut short.

    Raises:
        DataError: the source cannot be read, or has none of the columns the task asks from.
        OutputError: the output is of no known kind or cannot be written.
    """
    task, path = adapter_task(adapter), Path(output)
    if path.suffix not in {".jsonl", ".csv"}:
        raise OutputError(f"{path} should end in .jsonl or .csv; those are the formats written.")
    if path.exists() and path.resolve() == Path(source).resolve():
        raise OutputError(f"{path} is the file the rows come from; give another output.")
    names = mapping(adapter, source, split, columns)
    rows = read_raw(source, split=split, columns=names)
    if not any(column in rows.column_names for column in task.asks_from):
        raise DataError(
            f"{source} has none of the columns {', '.join(task.asks_from)}; it has {', '.join(rows.column_names)}. "
            f"Other names can be mapped: --columns {task.asks_from[0]}=NAME."
        )
    cut = 0
    with replacing(path) as file:
        writer = csv.writer(file)
        for number, (row, answer) in enumerate(zip(rows, predict(adapter, rows, task=task, **options), strict=True)):
            cut += not answer.get("finished", True)
            line = _line(row, answer, names)
            if path.suffix == ".jsonl":
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                continue
            if number == 0:
                writer.writerow(line)
            writer.writerow([_cell(value) for value in line.values()])
    return len(rows), cut


def _line(row: Mapping[str, Any], answer: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under its own column names, and the answer under names that hide none of them."""
    own = {columns.get(name, name): _plain(value) for name, value in row.items()}
    return own | {(f"predicted_{name}" if name in own else name): value for name, value in answer.items()}


def _plain(value: Any) -> Any:
    """Timestamps, which reading JSON makes of some strings, as the strings they were."""
    return value.isoformat() if isinstance(value, date) else value


def _cell(value: Any) -> str | int | float:
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    chunk: list[Mapping[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
