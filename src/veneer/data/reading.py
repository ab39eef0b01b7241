"""Reading data: files, folders, hub ids, catalogue names, mixtures of these.

Everything becomes a `datasets.Dataset`, which is memory-mapped, so data larger than memory works.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.catalogue import DATASETS
from veneer.data.formats import check_rows, detect
from veneer.errors import DataError, FetchError, did_you_mean
from veneer.storage import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


def read(
    source: str | Path | Mapping[str, Any] | Sequence[Any] | Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    check: bool = True,
) -> Dataset:
    """Read rows in a known format.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, text, Markdown), a folder of text or Markdown files, a
            catalogue name, a hub id, a `datasets.Dataset`, a list of rows; or a mixture: a list of sources or of
            mappings ``{"path": ..., "task": ..., "split": ..., "columns": ...}``.
        split: of a catalogue or hub data set.
        columns: our name of a column -> its name in the source.
        check: whether to check every row; off, only the columns are looked at.

    Raises:
        DataError: nothing is there, it cannot be parsed, or a row is wrong; says which file and row.
        FetchError: it has to be downloaded and cannot be.
    """
    if isinstance(source, list | tuple) and source and not _is_row(source[0]):
        return _mixed([read(part, split=split, columns=columns, check=check) for part in source])
    rows = read_raw(source, split=split, columns=columns)
    where = str(source) if isinstance(source, str | Path) else "the data"
    format = detect(rows.column_names, where)
    if check:
        check_rows(rows, format, where)
    return rows


def read_raw(source: Any, *, split: str = "train", columns: Mapping[str, str] | None = None) -> Dataset:
    """Read one source as `read` does, whatever columns it has (rows to answer need no answers).

    Raises:
        DataError: nothing is there, or it cannot be parsed.
        FetchError: it has to be downloaded and cannot be.
    """
    import datasets

    if isinstance(source, Mapping):
        return _read_part(source, split, columns)
    if isinstance(source, list | tuple):
        if not source:
            raise DataError("The data is an empty list.")
        return _renamed(datasets.Dataset.from_list([dict(row) for row in source]), columns, "the data")
    if isinstance(source, datasets.Dataset):
        return _renamed(source, columns, "the data")
    return _renamed(_load(str(source), split), columns, str(source))


def split_off(rows: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a random share for validation, at least one row on either side.

    Raises:
        DataError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError("A single row cannot be split into training and validation; set data.validation to 0.")
    held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    parts = rows.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" not in value


def _read_part(part: Mapping[str, Any], split: str, columns: Mapping[str, str] | None) -> Dataset:
    unknown = set(part) - {"path", "task", "split", "columns"}
    if unknown or "path" not in part:
        raise DataError(f"A data source has a path and may have task, split and columns; got {dict(part)!r}.")
    rows = read_raw(part["path"], split=part.get("split") or split, columns=part.get("columns") or columns)
    return rows if part.get("task") is None else _with_task(rows, str(part["task"]))


def _with_task(rows: Dataset, task: str) -> Dataset:
    if "task" in rows.column_names:
        rows = rows.remove_columns("task")
    return rows.add_column("task", [task] * len(rows))


def _mixed(parts: Sequence[Dataset]) -> Dataset:
    """One data set of several; each must have the same format, since one adapter learns one kind of row."""
    import datasets

    formats = {detect(part.column_names) for part in parts}
    if len(formats) > 1:
        raise DataError(
            f"The mixed data sets have different formats ({', '.join(f.name.lower() for f in formats)}); "
            "bring them to one, e.g. all to prompt and completion."
        )
    keep = {*formats.pop().columns, "task"}
    return datasets.concatenate_datasets([part.select_columns(sorted(keep & set(part.column_names))) for part in parts])


def _renamed(rows: Dataset, columns: Mapping[str, str] | None, where: str) -> Dataset:
    for ours, theirs in (columns or {}).items():
        if theirs not in rows.column_names:
            raise DataError(
                f"{where} has no column {theirs!r} to use as {ours!r}.{did_you_mean(theirs, rows.column_names)} "
                f"It has: {', '.join(rows.column_names)}."
            )
        if ours != theirs:
            if ours in rows.column_names:
                rows = rows.remove_columns(ours)
            rows = rows.rename_column(theirs, ours)
    if len(rows) == 0:
        raise DataError(f"{where} has no rows.")
    return rows


def _load(source: str, split: str) -> Dataset:
    if source in DATASETS:
        return _from_file(DATASETS[source].fetch(split))
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_file(path)
    if path.suffix in _READERS or path.is_absolute() or source.startswith((".", "~")) or "/" not in source:
        siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        known = [*siblings, *DATASETS]
        raise DataError(f"There is no data file {source}.{did_you_mean(path.name, known)}")
    return _from_hub(source, split)


def _from_file(path: Path) -> Dataset:
    import datasets

    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind; known are {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    try:
        options = _options(path, reader)
        return datasets.load_dataset(
            reader, data_files=str(path), split="train", cache_dir=str(cache_dir() / "datasets"), **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError, OSError, KeyError) as error:
        raise DataError(_explained(path, reader, error)) from error


def _options(path: Path, reader: str) -> dict[str, Any]:
    import datasets

    if reader == "text":
        return {"sample_by": "document"}
    if reader != "csv":
        return {}
    # Cells as they stand: 007 stays 007, and None, NA and null are words.
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _from_folder(path: Path) -> Dataset:
    """A folder of texts, a file a row; or of data files all of one kind."""
    import datasets

    files = data_files(path)
    kinds = {_READERS[file.suffix.lower()] for file in files}
    if not files:
        raise DataError(f"The folder {path} holds no data files ({', '.join(_READERS)}).")
    if len(kinds) > 1:
        raise DataError(f"The folder {path} mixes kinds of files ({', '.join(sorted(kinds))}); name one file.")
    return datasets.concatenate_datasets([_from_file(file) for file in files])


def data_files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth, that `read` can read."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _READERS and file.is_file())


def _from_hub(name: str, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FetchError(f"There is no file {name}, and as a hub data set it cannot be had: {first}") from error


def _explained(path: Path, reader: str, error: Exception) -> str:
    """Say where the file is broken, if that can be found out."""
    cause = error.__cause__ or error
    if "corresponds to no data" in str(error):
        return f"{path} has no rows."
    first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    try:
        with path.open(encoding="utf-8") as file:
            if reader == "json" and path.suffix.lower() != ".json":
                for number, line in enumerate(file, start=1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"{path}, line {number}: not a JSON object: {line.strip()[:80]}"
            else:
                for _ in file:
                    pass
    except UnicodeDecodeError:
        return f"{path} is not UTF-8 text; convert it first (e.g. with iconv)."
    except json.JSONDecodeError as broken:
        return f"{path}, line {number}: malformed JSON ({broken.msg} at column {broken.colno}): {line.strip()[:80]}"
    return f"{path} cannot be read as {reader}: {first}"
