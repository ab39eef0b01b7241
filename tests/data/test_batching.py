from __future__ import annotations

import pytest

from veneer.data.batching import EpochSampler

LENGTHS = [n * 37 % 101 for n in range(100)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_each_row_once_an_epoch_in_an_order_of_its_own(lengths: list[int] | None) -> None:
    sampler = EpochSampler(100, seed=3, lengths=lengths, group=8)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(100))
    assert list(sampler) != first
    assert list(EpochSampler(100, seed=4, lengths=lengths, group=8)) != first


def test_like_lengths_come_together() -> None:
    lengths = LENGTHS * 20
    order = list(EpochSampler(2000, seed=0, lengths=lengths, group=10))

    def padding(order: list[int]) -> int:
        groups = [[lengths[i] for i in order[start : start + 10]] for start in range(0, 2000, 10)]
        return sum(max(group) * len(group) - sum(group) for group in groups)

    assert padding(order) < padding(list(EpochSampler(2000, seed=0))) / 3
