"""The rows a config names: to learn from, and held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.data import Part, read, split_off
from veneer.training.config import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

TRAINING, VALIDATION = "training", "validation"


def parts_of(data: DataSettings, seed: int) -> list[Part]:
    """Rows to learn from and, if there are to be any, to validate on; the same whenever asked for while the data stay
    the same.

    Raises:
        DataError: they cannot be read.
        FetchError: or not be had.
    """
    rows = read(data.train, split=data.split, columns=data.columns, numbered=True)
    held_out: Dataset | None = None
    source, split = data.train, data.split
    if isinstance(data.validation, float | int):
        if data.validation:
            rows, held_out = split_off(rows, float(data.validation), seed=seed)
    else:
        source, split = data.validation, data.validation_split
        held_out = read(source, split=split, columns=data.columns, numbered=True)
    parts = [Part(TRAINING, _limited(rows, data.limit, seed), data.train, data.split)]
    if held_out is not None:
        parts.append(Part(VALIDATION, _limited(held_out, data.validation_limit, seed), source, split))
    return parts


def _limited(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))
