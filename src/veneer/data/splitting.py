"""Parting rows into training, validation and test.

    random       any row anywhere
    stratified   each value of a column with the same share in every part
    group        all rows of a group in one part: an author, a patient, a document
    time         training before validation before test

Each strategy returns one ascending array of row indices a part, training first. Together they hold every row once.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
from numpy.typing import NDArray

from veneer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Indices: TypeAlias = NDArray[numpy.int64]


def split_off(rows: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a random share for validation, at least one row on either side; stratified by label if there are
    labels, so that a rare one is never missing from training.

    Raises:
        DataError: there are fewer than two rows, or no label occurs twice.
    """
    if len(rows) < 2:
        raise DataError("A single row cannot be split into training and validation; set data.validation to 0.")
    if "label" in rows.column_names and "text" in rows.column_names:
        labels = [str(label) for label in rows["label"]]
        if len(set(labels)) == len(labels):
            raise DataError("Every label occurs once only, so none can be held out; set data.validation to 0.")
        train, held_out = stratified(labels, [share], seed=seed)
    else:
        train, held_out = randomly(len(rows), [share], seed=seed)
    return rows.select(train), rows.select(held_out)


def randomly(rows: int, shares: Sequence[float], *, seed: int) -> list[Indices]:
    """Parts of these shares (of validation, of test); training is the rest.

    Raises:
        DataError: there are too few rows for a part to have one.
    """
    counts = _counts(rows, shares)
    return _parts(numpy.random.default_rng(seed).permutation(rows), counts)


def stratified(values: Sequence[Hashable], shares: Sequence[float], *, seed: int) -> list[Indices]:
    """As `randomly`, with every value spread over the parts as the whole is; the rarest stay in training.

    Raises:
        DataError: there are too few rows for a part to have one.
    """
    wanted = _counts(len(values), shares)
    generator = numpy.random.default_rng(seed)
    strata: dict[Hashable, list[int]] = {}
    for index, value in enumerate(values):
        strata.setdefault(value, []).append(index)
    shuffled = [list(generator.permutation(rows)) for rows in strata.values()]
    taken: list[list[int]] = []
    for share, count in zip(shares, wanted[1:], strict=True):
        # Largest remainders: whole rows to each value first, then one more to those that were cut short most.
        exact = [share * len(strata_rows) for strata_rows in strata.values()]
        room = [len(rows) - 1 for rows in shuffled]  # one row of each value stays in training
        take = [min(math.floor(each), most) for each, most in zip(exact, room, strict=True)]
        order = sorted(range(len(take)), key=lambda i: exact[i] - take[i], reverse=True)
        while sum(take) < count and any(take[i] < room[i] for i in order):
            for i in order:
                if sum(take) < count and take[i] < room[i]:
                    take[i] += 1
        if not sum(take):
            raise DataError("Every value occurs once only, so none can be spread over several parts.")
        taken.append([rows.pop() for rows, some in zip(shuffled, take, strict=True) for _ in range(some)])
    rest = [row for rows in shuffled for row in rows]
    return [numpy.sort(numpy.array(part, dtype=numpy.int64)) for part in (rest, *taken)]


def grouped(values: Sequence[Hashable], shares: Sequence[float], *, seed: int) -> list[Indices]:
    """As `randomly`, with all rows of a value in the same part; parts come as near their shares as groups allow.

    Raises:
        DataError: there are fewer groups than parts.
    """
    counts = _counts(len(values), shares)
    groups: dict[Hashable, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    if len(groups) < len(counts):
        raise DataError(f"{len(groups)} groups cannot be parted into {len(counts)} parts.")
    order = numpy.random.default_rng(seed).permutation(len(groups))
    everything = list(groups.values())
    # The largest first, each to the part that lacks most; equal ones in random order.
    chosen: list[list[int]] = [[] for _ in counts]
    left = len(groups)
    for rows in sorted((everything[i] for i in order), key=len, reverse=True):
        empty = [part for part, of in enumerate(chosen) if not of]
        candidates = empty if len(empty) == left else range(len(counts))
        best = max(candidates, key=lambda part: (counts[part] - len(chosen[part])) / counts[part])
        chosen[best] += rows
        left -= 1
    return [numpy.sort(numpy.array(part, dtype=numpy.int64)) for part in chosen]


def by_time(times: Sequence[float], shares: Sequence[float]) -> list[Indices]:
    """Training before validation before test; rows of the same time stay together, in the earlier part.

    Raises:
        DataError: too few different times.
    """
    counts = _counts(len(times), shares)
    values = numpy.asarray(times)
    order = numpy.argsort(values, kind="stable")
    ends = []
    for end in numpy.cumsum(counts)[:-1]:
        while 0 < end < len(order) and values[order[end]] == values[order[end - 1]]:
            end += 1
        ends.append(int(end))
    parts = numpy.split(order, ends)
    if any(not len(part) for part in parts):
        raise DataError("Too many rows have the same time to part them by it.")
    return [numpy.sort(part) for part in parts]


def moment(value: Any) -> float | None:
    """A number, a date or an ISO 8601 time as seconds (or whatever the numbers count); None if it is none."""
    if isinstance(value, datetime.datetime | datetime.date):
        return _seconds(value)
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
        return number if math.isfinite(number) else None
    except (TypeError, ValueError):
        pass
    try:
        return _seconds(datetime.datetime.fromisoformat(str(value).strip()))
    except ValueError:
        return None


def _seconds(value: datetime.datetime | datetime.date) -> float:
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return value.timestamp()


def _counts(rows: int, shares: Sequence[float]) -> list[int]:
    """Rows of each part, training first."""
    counts = [max(1, round(share * rows)) for share in shares]
    if rows - sum(counts) < 1:
        raise DataError(f"{rows} rows are too few for {len(counts) + 1} parts of these sizes.")
    return [rows - sum(counts), *counts]


def _parts(order: NDArray[Any], counts: Sequence[int]) -> list[Indices]:
    return [numpy.sort(part) for part in numpy.split(order, numpy.cumsum(counts)[:-1])]
