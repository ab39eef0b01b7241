from __future__ import annotations

import datetime
from collections import Counter

import pytest

from helpers import sums
from veneer.data import read, split_off
from veneer.data.splitting import by_time, grouped, moment, randomly, stratified
from veneer.errors import DataError


def whole(parts: list[object]) -> list[int]:
    return sorted(int(index) for part in parts for index in part)  # type: ignore[attr-defined]


def test_at_random() -> None:
    parts = randomly(100, [0.1, 0.2], seed=0)
    assert [len(part) for part in parts] == [70, 10, 20]
    assert whole(parts) == list(range(100))
    assert all((part[:-1] < part[1:]).all() for part in parts)
    assert parts[1].tolist() != list(range(70, 80))
    assert [part.tolist() for part in randomly(100, [0.1, 0.2], seed=0)] == [part.tolist() for part in parts]
    assert randomly(100, [0.1], seed=1)[1].tolist() != randomly(100, [0.1], seed=0)[1].tolist()
    assert [len(part) for part in randomly(3, [0.01, 0.01], seed=0)] == [1, 1, 1]
    with pytest.raises(DataError, match="2 rows are too few for 3 parts"):
        randomly(2, [0.1, 0.1], seed=0)


def test_stratified() -> None:
    values = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["d"]
    parts = stratified(values, [0.2, 0.1], seed=0)
    assert whole(parts) == list(range(100))
    counts = [Counter(values[index] for index in part) for part in parts]
    assert counts[1] == {"a": 14, "b": 4, "c": 2}
    assert counts[2]["a"] == 7
    assert counts[2]["b"] == 2
    assert counts[0]["d"] == 1
    with pytest.raises(DataError, match="Every value occurs once only"):
        stratified(list("abcdef"), [0.2], seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed: int) -> None:
    values = [f"g{n % 17}" for n in range(200)]
    parts = grouped(values, [0.1, 0.1], seed=seed)
    assert whole(parts) == list(range(200))
    groups = [{values[index] for index in part} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert all(10 <= len(part) <= 30 for part in parts[1:])
    assert min(len(part) for part in grouped(["big"] * 50 + ["x", "y"], [0.1, 0.1], seed=seed)) == 1
    with pytest.raises(DataError, match="2 groups cannot be parted into 3"):
        grouped(["a", "b"] * 10, [0.1, 0.1], seed=seed)


def test_by_time() -> None:
    times = [5.0, 1.0, 4.0, 2.0, 3.0, 3.0, 9.0, 8.0, 7.0, 6.0]
    train, validation, test = by_time(times, [0.2, 0.2])
    assert whole([train, validation, test]) == list(range(10))
    assert max(times[i] for i in train) < min(times[i] for i in validation)
    assert max(times[i] for i in validation) < min(times[i] for i in test)
    tied = by_time([1.0, 2.0, 2.0, 2.0, 3.0], [0.4])
    assert [part.tolist() for part in tied] == [[0, 1, 2, 3], [4]]
    with pytest.raises(DataError, match="the same time"):
        by_time([1.0] * 10, [0.2])


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (1, 2.5),
        ("9", "10"),
        ("2024-12-31", "2025-01-01T00:00:00"),
        ("2025-01-01T12:00:00+02:00", "2025-01-01T11:00:00Z"),
        (datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 1)),
    ],
)
def test_moments(earlier: object, later: object) -> None:
    one, other = moment(earlier), moment(later)
    assert one is not None
    assert other is not None
    assert one < other


@pytest.mark.parametrize("value", ["soon", None, float("nan"), "inf", True])
def test_no_moments(value: object) -> None:
    assert moment(value) is None


def test_split_off() -> None:
    rows = read(sums(20))
    train, held_out = split_off(rows, 0.25, seed=0)
    assert (len(train), len(held_out)) == (15, 5)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert list(split_off(rows, 0.25, seed=0)[1]) == list(held_out)
    with pytest.raises(DataError, match="single row"):
        split_off(read(sums(1)), 0.5, seed=0)
    with pytest.raises(DataError, match="Every label occurs once only"):
        split_off(read([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]), 0.5, seed=0)


@pytest.mark.parametrize("seed", range(20))
def test_split_off_leaves_every_label_in_training(seed: int) -> None:
    rows = read([{"text": str(n), "label": "rare" if n == 7 else "yn"[n % 2]} for n in range(20)])
    train, held_out = split_off(rows, 0.3, seed=seed)
    assert len(held_out) == 6
    assert set(train["label"]) == {"rare", "y", "n"}
