"""How large must an adapter be? From entries of one method that differ in one size alone (rank, bottleneck, length).

Quality over size is fitted by a power law that levels off, as learning curves are (Hestness et al. 2017,
arXiv:1712.00409, for data; here for size): q(s) = q∞ + a · s^(−b), b > 0. What is advised needs no fit: the smallest
size that these runs do not tell from the best one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.optimize import OptimizeWarning, curve_fit

LEAST = 4
"""Sizes that three unknowns can be fitted to, with one to spare."""


@dataclass(frozen=True)
class Ladder:
    """One method at several sizes.

    Attributes:
        method: its name.
        setting: the one that differs.
        sizes: its values, ascending.
        quality: the metric's mean at each.
        advised: the smallest not told from the best of them.
        limit: q∞ of the fit, or None where there are too few sizes or it does not settle.
    """

    method: str
    setting: str
    sizes: Sequence[float]
    quality: Sequence[float]
    advised: float
    limit: float | None


def ladders(
    methods: Mapping[str, Mapping[str, Any]],
    besides: Mapping[str, Any],
    quality: Mapping[str, float],
    apart: Callable[[str, str], bool],
    *,
    lower_is_better: bool,
) -> list[Ladder]:
    """Those among the entries of a comparison.

    Args:
        methods: label -> its method's settings, with its name.
        besides: label -> what else its runs were made with; entries that differ in it are of no one ladder.
        quality: label -> the metric's mean; of entries that came out.
        apart: whether the runs tell the entries of two labels apart.
        lower_is_better: which way the metric goes.
    """
    found = []
    for setting, group in _groups({label: methods[label] for label in quality if label in methods}, besides):
        labels = sorted(group, key=lambda label: float(methods[label][setting]))
        best = (min if lower_is_better else max)(labels, key=lambda label: quality[label])
        near = [label for label in labels if label == best or not apart(best, label)]
        sizes = [float(methods[label][setting]) for label in labels]
        values = [quality[label] for label in labels]
        name = str(methods[best]["name"])
        advised = float(methods[near[0]][setting])
        found.append(Ladder(name, setting, sizes, values, advised, _limit(sizes, values)))
    return found


def _groups(methods: Mapping[str, Mapping[str, Any]], besides: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Labels of one method that differ in one number and nothing else, three at least."""
    groups: dict[tuple[str, str], list[str]] = {}
    for label, settings in methods.items():
        for key, value in settings.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                rest = repr(sorted((name, repr(other)) for name, other in settings.items() if name != key))
                rest += repr(besides.get(label))
                groups.setdefault((key, rest), []).append(label)
    return [(key, labels) for (key, _), labels in groups.items() if len({methods[label][key] for label in labels}) > 2]


def _limit(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    if len(set(sizes)) < LEAST:
        return None

    def law(size: Any, limit: float, scale: float, power: float) -> Any:
        return limit + scale * size ** (-power)

    start = (values[-1], values[0] - values[-1], 0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            bounds = ([-math.inf, -math.inf, 0.05], [math.inf, math.inf, 4])
            fitted, _ = curve_fit(law, numpy.array(sizes), numpy.array(values), start, bounds=bounds)
    except (RuntimeError, OptimizeWarning):
        return None
    return float(fitted[0])
