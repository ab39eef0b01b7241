"""Intervals and tests over seeds and rows: exact in the cases that have names, and honest in those that have not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import pytest
from scipy import stats

from veneer.evaluation.comparison.statistics import Scores, difference, estimate, holm, of_seeds

RANDOM = numpy.random.default_rng(0)


def scores(values: object, items: object = None, seeds: Sequence[int] | None = None) -> Scores:
    table = numpy.asarray(values, float)
    weights = numpy.ones(table.shape[1]) if items is None else numpy.asarray(items, float)
    return Scores(table, weights, range(len(table)) if seeds is None else seeds)


def test_one_seed_is_a_t_interval_over_rows() -> None:
    rows = RANDOM.normal(1, 1, 30)
    found = estimate(scores([rows]))
    wanted = stats.ttest_1samp(rows, 0)
    interval = wanted.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((rows.mean(), interval.low, interval.high))
    assert found.p == pytest.approx(wanted.pvalue)


def test_rows_that_are_all_alike_leave_a_t_interval_over_seeds() -> None:
    seeds = numpy.array([0.90, 0.93, 0.95])
    found = estimate(scores(numpy.repeat(seeds[:, None], 50, axis=1)))
    interval = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_intervals_hold_as_often_as_they_say() -> None:
    """Also with three seeds that lie apart, where rows alone would be far too sure of themselves."""
    for between in (0.0, 0.05):
        caught = 0
        for _ in range(400):
            table = (
                RANDOM.normal(0, between, (3, 1)) + RANDOM.normal(0, 0.3, (1, 150)) + RANDOM.normal(0, 0.3, (3, 150))
            )
            found = estimate(scores(table))
            caught += found.low <= 0 <= found.high
        assert 0.91 < caught / 400 < 0.985


def test_pairing_by_row_cancels_what_makes_a_row_hard() -> None:
    hard = RANDOM.normal(0, 1, (1, 200))
    ours, theirs = (scores(hard + mean + RANDOM.normal(0, 0.05, (3, 200))) for mean in (0.02, 0.0))
    found = difference(ours, theirs)
    assert found is not None
    assert 0 < found.low < 0.02 < found.high < 0.04
    assert estimate(ours).low < 0  # alone it is not even told from 0


def test_rows_weigh_as_much_as_they_have_items() -> None:
    found = estimate(scores([[2.0, 9.0]], [1, 3]))
    assert found.mean == pytest.approx(11 / 4)
    assert difference(scores([[1.0, 2.0]], [1, 2]), scores([[1.0, 2.0]], [1, 3])) is None
    assert difference(scores([[1.0, 2.0]]), scores([[1.0, 2.0, 3.0]])) is None


def test_the_plain_base_has_one_run_beside_several() -> None:
    base = scores(RANDOM.normal(0, 1, (1, 100)), seeds=())
    ours = scores(base.values + 0.5 + RANDOM.normal(0, 0.01, (3, 100)))
    found = difference(ours, base)
    assert found is not None
    assert found.seeds == 3
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.05


def test_seeds_are_paired_by_number() -> None:
    """Seed 0 of one failed: its others are beside those of the same number, whatever their place."""
    theirs = scores(numpy.arange(3)[:, None] + RANDOM.normal(0, 1, (1, 30)))
    ours = scores(theirs.values[1:] + 0.5, seeds=(1, 2))
    found = difference(ours, theirs)
    assert found is not None
    assert (found.seeds, found.low, found.high) == pytest.approx((2, 0.5, 0.5))
    single = difference(scores(theirs.values[2:] + 0.5, seeds=(2,)), theirs)
    assert single is not None
    assert (single.seeds, single.mean) == pytest.approx((1, 0.5))
    assert difference(scores(theirs.values[:1], seeds=(7,)), theirs) is None


def test_seeds_that_happen_to_be_equal_are_no_certainty() -> None:
    """One more right of 60 in each of two seeds, but on another row each."""
    table = numpy.zeros((2, 60))
    table[0, 3] = table[1, 40] = 1
    assert estimate(scores(table)).p > 0.3
    assert estimate(scores(table)).low < 0


@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_methods_are_told_apart_no_more_often_than_they_may(seeds: int) -> None:
    """Right and wrong answers, as accuracy has them."""
    wrong = 0
    for _ in range(600):
        hard = RANDOM.normal(1.8, 1.5, (1, 60))
        ours, theirs = (
            scores(hard + RANDOM.normal(0, 0.7, (seeds, 60)) + RANDOM.normal(0, 0.3, (seeds, 1)) > 0) for _ in "ab"
        )
        found = difference(ours, theirs)
        assert found is not None
        wrong += found.p < 0.05
    assert wrong / 600 < 0.06


def test_what_is_alike_is_alike() -> None:
    same = scores(RANDOM.normal(0, 1, (2, 20)))
    found = difference(same, same)
    assert found is not None
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert math.isnan(estimate(scores([[1.0]])).p)


def test_seeds_alone() -> None:
    found = of_seeds([1.0, 2.0, 3.0])
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert of_seeds([2.0]).low == 2.0


def test_holm() -> None:
    """By hand: 4 × 0.005, 3 × 0.01, 2 × 0.03, and not below the one before."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
