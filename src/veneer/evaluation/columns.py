"""Columns under other names: those an adapter was trained with need not be told again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapters import Adapter
from veneer.data.reading import read_raw


def mapping(adapter: Adapter, source: Any, split: str, given: Mapping[str, str] | None) -> dict[str, str]:
    """Our name of a column -> its name in ``source``: as given, else as in training as far as the source has them.

    Raises:
        DataError: the source cannot be read.
    """
    learned = adapter.record.get("config", {}).get("data", {}).get("columns")
    if given or not learned or not isinstance(source, str | Path):
        return dict(given or {})
    there = read_raw(source, split=split).column_names
    return {ours: theirs for ours, theirs in learned.items() if theirs in there}
