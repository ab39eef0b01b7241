"""The rows a config names: to learn from, and held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.data import read, split_off
from veneer.training.config import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset


def train_and_held_out(data: DataSettings, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows to learn from and to validate on, the same whenever asked for while the data stay the same.

    Raises:
        DataError: they cannot be read.
        FetchError: or not be had.
    """
    rows = read(data.train, split=data.split, columns=data.columns)
    held_out: Dataset | None = None
    if isinstance(data.validation, float | int):
        if data.validation:
            rows, held_out = split_off(rows, float(data.validation), seed=seed)
    else:
        held_out = read(data.validation, split=data.validation_split, columns=data.columns)
    return _limited(rows, data.limit, seed), held_out and _limited(held_out, data.validation_limit, seed)


def _limited(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))
