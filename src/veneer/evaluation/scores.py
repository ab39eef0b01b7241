"""A number that was measured, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from veneer.evaluation.intervals import of_mean, of_ratio


@dataclass(frozen=True)
class Score:
    """A metric, with its 95 % interval where it is a mean over rows."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Of one value a row."""
        return cls(fmean(values), *of_mean(values))

    @classmethod
    def of_items(cls, sums: Sequence[float], items: Sequence[float]) -> Score:
        """The mean over the items of rows, from the sum over those of each row and their number."""
        return cls(*of_ratio(sums, items))
