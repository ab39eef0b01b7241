"""The records of a data file as they stand in it: the line each begins in, and its very characters."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LINES = {".jsonl", ".ndjson"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LARGEST_CELL = 2**31 - 1
_NAMED = 10


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        line: the line it begins in, counted from 1.
        text: its characters, with the line break that ends it.
        cells: of a table; empty otherwise.
    """

    line: int
    text: str
    cells: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """Where a row stands: its file (or what else it came from), and the line, or the row, counted from 1."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


def has_lines(path: Path) -> bool:
    """Whether rows of this kind of file can be told by the line they stand in."""
    return path.suffix.lower() in LINES or path.suffix.lower() in SEPARATORS


def records(path: Path) -> Iterator[Record]:
    """The records of a JSONL, CSV or TSV file, blank lines left out; a table's header is the first.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in SEPARATORS:
            yield from _table(file, SEPARATORS[path.suffix.lower()])
        else:
            yield from (Record(number, line) for number, line in enumerate(file, start=1) if line.strip())


def rows(path: Path) -> Iterator[Record]:
    """`records` without a table's header: one for each row read."""
    found = records(path)
    if path.suffix.lower() in SEPARATORS:
        next(found, None)
    return found


def told(places: Sequence[Place], count: int) -> str:
    """The first of ``count`` places for people: ``answers.jsonl, lines 3, 7 and 20 more``."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place in places[:_NAMED]:
        groups.setdefault((place.source, place.unit), []).append(place.number)
    parts = [
        f"{source}, {unit}{'s' * (len(numbers) > 1)} {', '.join(str(number) for number in numbers)}"
        for (source, unit), numbers in groups.items()
    ]
    more = count - min(len(places), _NAMED)
    return "; ".join(parts) + (f" and {more:,} more" if more > 0 else "")


def _table(file: TextIO, separator: str) -> Iterator[Record]:
    csv.field_size_limit(_LARGEST_CELL)  # a cell may hold a document
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in file:
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=separator)
    for cells in reader:
        record = Record(reader.line_num - len(taken) + 1, "".join(taken), cells)
        taken.clear()
        if cells:
            yield record
