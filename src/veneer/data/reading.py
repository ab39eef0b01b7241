"""Reading data: files, folders, hub ids, catalogue names, mixtures of these.

Everything becomes a `datasets.Dataset`, which is memory-mapped, so data larger than memory works.
"""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.catalogue import DATASETS
from veneer.data.diagnosis import check_bytes, check_header, explained
from veneer.data.formats import TASK, Format, detect, problems, task_told
from veneer.data.records import SEPARATORS, Place, has_lines
from veneer.data.records import rows as records_of
from veneer.errors import DataError, FetchError, did_you_mean
from veneer.storage import cache_dir, sha256

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
NUMBER = "__row__"
"""Column of `read` with ``numbered=True``: which row of the source each is, whatever is shuffled or left out later."""
_TOLD = 10


def read(
    source: str | Path | Mapping[str, Any] | Sequence[Any] | Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    check: bool = True,
    numbered: bool = False,
) -> Dataset:
    """Read rows in a known format.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, text, Markdown), a folder of text or Markdown files, a
            catalogue name, a hub id, a `datasets.Dataset`, a list of rows; or a mixture: a list of sources or of
            mappings ``{"path": ..., "task": ..., "split": ..., "columns": ...}``.
        split: of a catalogue or hub data set.
        columns: our name of a column -> its name in the source.
        check: whether to check every row; off, only the columns are looked at.
        numbered: add a column `NUMBER`, from which `places` tells the line of a row.

    Raises:
        DataError: nothing is there, it cannot be parsed, or a row is wrong; says which file and row.
        FetchError: it has to be downloaded and cannot be.
    """
    if isinstance(source, list | tuple) and _is_mixture(source):
        rows = _mixed([read(part, split=split, columns=columns, check=check) for part in source])
    else:
        rows = _tasks_by_name(read_raw(source, split=split, columns=columns))
        format = detect(rows.column_names, _name(source))
        if check:
            _check_rows(rows, format, source, split)
    return _numbered(rows) if numbered else rows


def places(source: Any, numbers: Sequence[int], *, split: str = "train") -> list[Place]:
    """Where rows of a source stand: file and line where there are lines, else the row.

    Args:
        source: as it was given to `read`.
        numbers: of rows, as in the column `NUMBER`.
        split: as it was given to `read`.
    """
    found: dict[int, Place] = {}
    start = 0
    for name, path, count in _files(source, split):
        wanted = {number - start for number in numbers if start <= number < start + count}
        if path is not None and has_lines(path) and wanted:
            for index, record in enumerate(records_of(path)):
                if index in wanted:
                    found[start + index] = Place(name, "line", record.line)
        else:
            found |= {start + index: Place(name, "row", index + 1) for index in wanted}
        start += count
    return [found.get(number) or Place(_name(source), "row", number + 1) for number in numbers]


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
        told = [{**row, TASK: task_told(row[TASK])} if TASK in row else dict(row) for row in source]
        return _renamed(datasets.Dataset.from_list(told), columns, "the data")
    if isinstance(source, datasets.Dataset):
        return _renamed(source, columns, "the data")
    return _renamed(_load(str(source), split), columns, str(source))


def each(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows one by one; a good deal faster than iterating over the data set."""
    for batch in rows.iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def file_of(source: str, split: str = "train") -> Path:
    """The data file a name leads to: itself, or a catalogued data set's.

    Raises:
        DataError: it is no file of a known kind.
    """
    path = DATASETS[source].fetch(split) if source in DATASETS else Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source} is a folder; name one file of it.")
    if not path.is_file():
        raise _missing(source, path)
    _reader(path)
    return path


def _check_rows(rows: Dataset, format: Format, source: Any, split: str) -> None:
    wrong: dict[int, str] = {}
    for index, problem in problems(each(rows), format):
        wrong.setdefault(index, problem)
    if not wrong:
        return
    where = places(source, list(wrong)[:_TOLD], split=split)
    told = [f"{place}: {problem}." for place, problem in zip(where, wrong.values(), strict=False)]
    if len(told) == 1:
        raise DataError(told[0])
    more = f"\n  and {len(wrong) - len(told):,} more" if len(wrong) > len(told) else ""
    raise DataError(f"{_name(source)} has {len(wrong):,} bad rows:\n  " + "\n  ".join(told) + more)


def _numbered(rows: Dataset) -> Dataset:
    import numpy

    if NUMBER in rows.column_names:
        rows = rows.remove_columns(NUMBER)
    return rows.add_column(NUMBER, numpy.arange(len(rows)))


def _name(source: Any) -> str:
    if isinstance(source, Mapping):
        return str(source["path"])
    return str(source) if isinstance(source, str | Path) else "the data"


def _files(source: Any, split: str) -> list[tuple[str, Path | None, int]]:
    """What `read` reads, in its order: name, file (None where there is none), number of rows."""
    if isinstance(source, list | tuple) and _is_mixture(source):
        return [file for part in source for file in _files(part, split)]
    if isinstance(source, Mapping):
        return _files(source["path"], source.get("split") or split)
    if isinstance(source, str | Path):
        path = DATASETS[str(source)].fetch(split) if str(source) in DATASETS else Path(source).expanduser()
        if path.is_dir():
            return [(str(file), file, len(_from_file(file))) for file in data_files(path)]
        if path.is_file():
            return [(str(source), path, len(_from_file(path)))]
    return [(_name(source), None, len(read_raw(source, split=split)))]


def _is_mixture(source: Sequence[Any]) -> bool:
    return bool(source) and not _is_row(source[0])


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
    return _labelled_by_name(rows)


def _tasks_by_name(rows: Dataset) -> Dataset:
    """Numbers in a task column are names; vectors stay what they are."""
    import datasets

    if TASK not in rows.column_names or rows.features[TASK] == datasets.Value("string"):
        return rows
    told = [task_told(task) for task in rows[TASK][:]]
    if not all(task is None or isinstance(task, str) for task in told):
        return rows
    return rows.remove_columns(TASK).add_column(TASK, told, feature=datasets.Value("string"))


def _labelled_by_name(rows: Dataset) -> Dataset:
    """Hub data sets often number their labels and keep the names aside."""
    import datasets

    feature = rows.features.get("label")
    if not isinstance(feature, datasets.ClassLabel):
        return rows
    names = feature.names
    numbers = rows["label"][:]
    labels = [None if number is None or number < 0 else names[number] for number in numbers]
    return rows.remove_columns("label").add_column("label", labels, feature=datasets.Value("string"))


def _load(source: str, split: str) -> Dataset:
    if source in DATASETS:
        return _from_file(DATASETS[source].fetch(split))
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_file(path)
    if path.suffix in _READERS or path.is_absolute() or source.startswith((".", "~")) or "/" not in source:
        raise _missing(source, path)
    return _from_hub(source, split)


def _missing(source: str, path: Path) -> DataError:
    siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
    return DataError(f"There is no data file {source}.{did_you_mean(path.name, [*siblings, *DATASETS])}")


def _reader(path: Path) -> str:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind; known are {', '.join(_READERS)}.")
    return reader


def _from_file(path: Path) -> Dataset:
    import datasets

    reader = _reader(path)
    try:
        check_bytes(path, reader)
        options = _options(path, reader)
        # datasets tells files apart by path and time of change, which a copy may share; their content is what counts.
        cache = cache_dir() / "datasets" / sha256(path)[:16]
        with _silent():
            return datasets.load_dataset(reader, data_files=str(path), split="train", cache_dir=str(cache), **options)
    except DataError:
        raise
    except (
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        TypeError,
        OSError,
        KeyError,
        StopIteration,
        csv.Error,
    ) as error:
        raise DataError(explained(path, reader, error)) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What goes wrong is said by `explained`; datasets' own log would say it a second time."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _options(path: Path, reader: str) -> dict[str, Any]:
    import datasets

    if reader == "text":
        return {"sample_by": "document", "encoding": "utf-8-sig"}
    if reader != "csv":
        return {}
    # Cells as they stand: 007 stays 007, and None, NA and null are words.
    separator = SEPARATORS[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    check_header(path, header)
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
