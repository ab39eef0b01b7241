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
