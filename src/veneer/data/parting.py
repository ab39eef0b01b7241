"""A data file parted into several of its own format, each row as it stood, by one of the strategies of `splitting`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.reading import file_of, places, read_raw
from veneer.data.records import SEPARATORS, has_lines, records, rows, told
from veneer.data.splitting import Indices, by_time, grouped, moment, randomly, stratified
from veneer.errors import ConfigError, DataError, OutputError, did_you_mean
from veneer.storage import new_folder, replacing

TRAIN = "train"


@dataclass(frozen=True)
class Written:
    """A part that was written.

    Attributes:
        file: its path.
        rows: how many.
    """

    file: str
    rows: int


def part_file(
    source: str, output: Path, shares: Mapping[str, float], *, by: Mapping[str, str | None], seed: int
) -> dict[str, Written]:
    """Write ``output/train.SUFFIX`` and a file for each share, of the rows of ``source``.

    JSONL, CSV and TSV come out letter for letter as they stand, with a table's header in each file.

    Args:
        source: a file, or a catalogued data set's name.
        output: a folder that doesn't exist yet, or is empty; it is written whole or not at all.
        shares: of the parts other than training, by their names.
        by: strategy (stratified, group, time) -> the column it goes by; one at most, else at random.
        seed: of the random choice.

    Raises:
        ConfigError: several strategies, or shares that leave nothing to train on.
        DataError: the file cannot be read or parted so.
        OutputError: there is something in the folder already, or it cannot be written.
    """
    chosen = {strategy: column for strategy, column in by.items() if column is not None}
    if len(chosen) > 1:
        raise ConfigError(f"Part by one thing at a time, not by {' and '.join(chosen)}.")
    if sum(shares.values()) >= 1:
        raise ConfigError(
            f"Shares of {' and '.join(f'{share:g}' for share in shares.values())} leave no training rows."
        )
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise OutputError(f"{output} exists already; nothing was written. Choose another folder, or empty it first.")
    path = file_of(source)
    if not has_lines(path) and path.suffix.lower() not in {".json", ".parquet"}:
        raise DataError(f"{source} is a single document, so there are no rows to part; put it into several files.")
    strategy, column = next(iter(chosen.items()), ("random", ""))
    indices = _parted(path, strategy, column, list(shares.values()), seed)
    parts = dict(zip((TRAIN, *shares), indices, strict=True))
    with new_folder(output) as folder:
        _write(path, folder, parts)
    return {name: Written(str(output / f"{name}{path.suffix}"), len(rows)) for name, rows in parts.items()}


def _parted(path: Path, strategy: str, column: str, shares: Sequence[float], seed: int) -> list[Indices]:
    data = read_raw(str(path))
    if strategy == "random":
        return randomly(len(data), shares, seed=seed)
    if column not in data.column_names:
        raise DataError(
            f"{path} has no column {column!r}.{did_you_mean(column, data.column_names)} "
            f"It has: {', '.join(data.column_names)}."
        )
    values = data[column][:]
    if empty := [index for index, value in enumerate(values) if value is None or value == ""]:
        raise DataError(
            f"{len(empty):,} rows have no {column!r} ({_where(path, empty)}); fill it in, or take them out."
        )
    if strategy == "time":
        times = [moment(value) for value in values]
        if wrong := [index for index, time in enumerate(times) if time is None]:
            raise DataError(
                f"{values[wrong[0]]!r} in column {column!r} is neither a number nor an ISO 8601 date such as "
                f"2025-01-31 ({_where(path, wrong)})."
            )
        return by_time([time for time in times if time is not None], shares)
    keys = [json.dumps(value, sort_keys=True, default=str) for value in values]
    return (grouped if strategy == "group" else stratified)(keys, shares, seed=seed)


def _where(path: Path, indices: Sequence[int]) -> str:
    return told(places(str(path), indices[:100]), len(indices))


def _write(source: Path, folder: Path, parts: Mapping[str, Indices]) -> None:
    suffix = source.suffix.lower()
    targets = {name: folder / f"{name}{source.suffix}" for name in parts}
    if has_lines(source):
        _write_records(source, targets, parts)
    elif suffix == ".json":
        _write_json(source, targets, parts)
    else:
        _write_parquet(source, targets, parts)


def _write_records(source: Path, targets: Mapping[str, Path], parts: Mapping[str, Indices]) -> None:
    home = _home(parts)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(replacing(target)) for name, target in targets.items()}
        if source.suffix.lower() in SEPARATORS:
            header = next(records(source))
            for file in files.values():
                file.write(header.text)
        for index, record in enumerate(rows(source)):
            files[home[index]].write(record.text)


def _write_json(source: Path, targets: Mapping[str, Path], parts: Mapping[str, Indices]) -> None:
    text = source.read_text(encoding="utf-8-sig")
    values: list[Any] = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(record.text) for record in records(source)]
    )
    for name, target in targets.items():
        with replacing(target) as file:
            lines = [json.dumps(values[index], ensure_ascii=False) for index in parts[name]]
            file.write("[\n" + ",\n".join(lines) + "\n]\n")


def _write_parquet(source: Path, targets: Mapping[str, Path], parts: Mapping[str, Indices]) -> None:
    from pyarrow import parquet

    table = parquet.read_table(source)
    for name, target in targets.items():
        parquet.write_table(table.take(list(parts[name])), target)


def _home(parts: Mapping[str, Indices]) -> dict[int, str]:
    return {int(index): name for name, indices in parts.items() for index in indices}
