"""What several seeds, scored on the same held-out rows, say of a method, and of two methods beside each other.

Both seeds and rows are samples: of trainings that might have been, of rows that might have been held out. For scores
x_sr of seed s on row r this is a two-way table without replication, as readers and cases are in studies of diagnostic
tests; Dorfman, Berbaum & Metz (1992) and Hillis (2007, *Statistics in Medicine* 26) give mean, error and degrees of
freedom:

    Var(x̄) = ( M + max(MS_r − MS_sr, 0) ) / (S·R)             MS_s, MS_r, MS_sr  the mean squares of seeds, rows, both
    df     = ( M + max(MS_r − MS_sr, 0) )² / ( M² / (S−1) )    M = max(MS_s, MS_sr)
    x̄ ± t(df) · √Var

M is ours; theirs is MS_s. Its expectation is that of MS_sr plus R times the variance of seeds, so it is smaller than
MS_sr by chance only; with two or three seeds often, and then by any factor: seeds whose means happen to be equal would
leave no error at all. So Var is never below that of rows alone, and df never above what S seeds know of how far seeds
lie apart. Simulated right and wrong answers of two equal methods (4,000 draws; 60 and 200 rows): told apart at 0.05

                        two seeds                         three seeds
    with MS_s           8.9 and 8.2 %, 10.2 and 8.9 %     5.1 and 6.6 %, 6.3 and 5.9 %      seeds alike, seeds apart
    with M              0.0 and 0.0 %,  1.0 and 1.6 %     0.3 and 0.0 %, 1.8 and 3.4 %

Differences of two methods are taken row by row first, so that what makes a row hard for both cancels. With three seeds
that lie far apart, df is near 2 and the interval wide, as it should be. One seed says nothing of other seeds: then the
interval is of rows only, and said to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[numpy.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scores:
    """A method's scores on held-out rows.

    Attributes:
        values: ``[seeds, rows]``, summed over the items of each row.
        items: ``[rows]``, how many items a row has: what it weighs.
        seeds: their numbers; none for what has no seeds (the plain base), whose one row of values is the same for each.
    """

    values: Values
    items: Values
    seeds: Sequence[int]

    def of(self, seeds: Sequence[int]) -> Values:
        """``[len(seeds), rows]``: the values of these seeds."""
        return self.values[[self.seeds.index(seed) for seed in seeds]] if self.seeds else self.values

    @property
    def means(self) -> Values:
        """``[seeds]``: of each seed, over all items."""
        return self.values.sum(1) / self.items.sum()


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: over seeds and items.
        low: end of the interval.
        high: the other end.
        p: of the hypothesis that it is 0, two-sided.
        seeds: it is a mean over.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def estimate(scores: Scores) -> Estimate:
    """The mean over seeds and rows."""
    mean = float(scores.means.mean())
    # Linearised, so that rows of unequally many items can be treated as rows (see `intervals.of_ratio`).
    table = (scores.values - mean * scores.items) * (len(scores.items) / scores.items.sum())
    return _of_table(table, mean)


def difference(ours: Scores, theirs: Scores) -> Estimate | None:
    """Ours minus theirs on the same rows; None where the rows are not the same, or count otherwise, or no seed is.

    Seeds are paired by their numbers, as far as both have them: they share the order of rows and the choice of
    training rows.
    """
    if ours.items.shape != theirs.items.shape or not numpy.array_equal(ours.items, theirs.items):
        return None
    seeds = [seed for seed in ours.seeds or theirs.seeds if seed in (theirs.seeds or ours.seeds)]
    if not seeds and (ours.seeds or theirs.seeds):
        return None
    return estimate(Scores(ours.of(seeds) - theirs.of(seeds), ours.items, seeds))


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, by Student's t."""
    mean, count = float(numpy.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, mean, mean, math.nan, count)
    error = float(numpy.std(values, ddof=1)) / math.sqrt(count)
    return _estimate(mean, error, count - 1, count)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for being several (Holm 1979): k-th smallest × (n − k + 1), never falling."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        highest = max(highest, min(1.0, ps[name] * (len(ps) - rank)))
        adjusted[name] = highest
    return adjusted


def _of_table(table: Values, mean: float) -> Estimate:
    """``[seeds, rows]`` deviations, whose mean is 0."""
    seeds, rows = table.shape
    if rows < 2:
        return Estimate(mean, mean, mean, math.nan, seeds)
    by_row, by_seed = table.mean(0), table.mean(1)
    of_rows = seeds * float(by_row.var(ddof=1))
    if seeds == 1:
        return _estimate(mean, math.sqrt(of_rows / rows), rows - 1, seeds)
    of_seeds = rows * float(by_seed.var(ddof=1))
    rest = table - by_row - by_seed[:, None] + table.mean()
    both = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))
    of_seeds = max(of_seeds, both)
    whole = of_seeds + max(of_rows - both, 0.0)
    freedom = whole**2 / (of_seeds**2 / (seeds - 1)) if of_seeds else math.inf
    return _estimate(mean, math.sqrt(whole / (seeds * rows)), freedom, seeds)


def _estimate(mean: float, error: float, freedom: float, seeds: int) -> Estimate:
    if error == 0:
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0, seeds)
    spread = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - spread, mean + spread, p, seeds)
