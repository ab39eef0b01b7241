"""Rows to report on: training, validation or test, and where each row stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from veneer.data.reading import NUMBER, places
from veneer.data.records import Place, told

if TYPE_CHECKING:
    from datasets import Dataset

_LISTED = 100


@dataclass(frozen=True)
class Tokens:
    """Tokens of rows before any was cut, and what cutting did.

    Attributes:
        given: ``[rows]``, tokens that are read: of prompts, or of texts to classify.
        learned: ``[rows]``, tokens that carry loss.
        truncated: indices of rows that were cut.
        dropped: indices of rows left out, with nothing to learn after cutting.
        kept: tokens in all after cutting.
        limit: the longest length allowed.
    """

    given: NDArray[Any]
    learned: NDArray[Any]
    truncated: NDArray[Any]
    dropped: NDArray[Any]
    kept: int
    limit: int


@dataclass(frozen=True)
class Part:
    """Rows to report on.

    Attributes:
        name: training, validation or test.
        rows: numbered ones (see `read`) have their lines told.
        source: what they were read from.
        split: likewise.
        tokens: of them, if they were counted.
        unknown: index of a row -> its label that training doesn't know.
    """

    name: str
    rows: Dataset
    source: Any = None
    split: str = "train"
    tokens: Tokens | None = None
    unknown: Mapping[int, str] = field(default_factory=dict)

    def where(self, indices: Sequence[int] | NDArray[Any]) -> str:
        """These rows for people, by file and line."""
        if self.source is None or NUMBER not in self.rows.column_names:
            return told([Place("the data", "row", int(index) + 1) for index in indices], len(indices))
        numbers = [int(number) for number in self.rows.select(indices[:_LISTED])[NUMBER]]
        found = places(self.source, sorted(numbers), split=self.split)
        return told(found, len(indices))
