"""Confidence intervals of what is measured on a sample of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def wilson(hits: float, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927): holds near 0 and 1 and for few rows.

    ( p + z²/2n  ±  z √( p(1−p)/n + z²/4n² ) )  /  ( 1 + z²/n )
    """
    if rows <= 0:
        raise ValueError("An interval needs at least one row.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / rows
    centre = share + z * z / (2 * rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def of_mean(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a mean: Wilson's for values that are all 0 or 1, else by the normal approximation."""
    mean = fmean(values)
    if set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values), confidence)
    if len(values) < 2:
        return mean, mean
    spread = NormalDist().inv_cdf(0.5 + confidence / 2) * stdev(values) / math.sqrt(len(values))
    return mean - spread, mean + spread


def of_ratio(sums: Sequence[float], weights: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Σ sums / Σ weights over rows, and its interval, by linearisation (Cochran 1977, *Sampling Techniques*, §6.3).

    The mean over items (tokens) of rows that have unequally many of them; rows are what is drawn at random. Rows
    without items don't count.
    """
    pairs = [(value, weight) for value, weight in zip(sums, weights, strict=True) if weight > 0]
    if not pairs:
        raise ValueError("An interval needs at least one row.")
    whole = sum(weight for _, weight in pairs)
    ratio = sum(value for value, _ in pairs) / whole
    if len(pairs) < 2:
        return ratio, ratio, ratio
    apart = [(value - ratio * weight) * len(pairs) / whole for value, weight in pairs]
    spread = NormalDist().inv_cdf(0.5 + confidence / 2) * stdev(apart) / math.sqrt(len(pairs))
    return ratio, ratio - spread, ratio + spread
