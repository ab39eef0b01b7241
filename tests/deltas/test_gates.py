"""Gates told by a row's tokens: what counts, what is in sight, and what is remembered from step to step."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from veneer.adapters.memory import Memory, carried, carry
from veneer.deltas import Among, Flow, Opening

D, ROWS, LENGTH = 4, 3, 6
X = torch.randn(ROWS, LENGTH, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT, BIAS = torch.randn(D, generator=torch.Generator().manual_seed(1)).double(), torch.tensor(0.3).double()
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
OPENED = (X @ WEIGHT + BIAS).sigmoid()


def opening(flow: Flow, *, causal: bool, **more: object) -> Opening:
    return Opening(WEIGHT, BIAS, flow, "gate", causal, decoder=False, **more)  # type: ignore[arg-type]


def test_the_mean_is_over_real_tokens() -> None:
    got = opening(Flow(ROWS, MASK), causal=False)(X)
    expected = torch.stack([row[mask.bool()].mean() for row, mask in zip(OPENED, MASK, strict=True)])
    torch.testing.assert_close(got, expected[:, None])
    some = opening(Flow(ROWS, MASK), causal=False).for_rows(Among([2, 0], ROWS, 0))(X[[2, 0]])
    torch.testing.assert_close(some, expected[[2, 0], None])


def test_rows_along_the_second_axis() -> None:
    got = opening(Flow(ROWS, MASK), causal=False, axis=1)(X.transpose(0, 1))
    torch.testing.assert_close(got, opening(Flow(ROWS, MASK), causal=False)(X))


def test_a_causal_mean_is_over_the_tokens_so_far() -> None:
    got = opening(Flow(ROWS, MASK), causal=True)(X)
    for row in range(ROWS):
        for at in range(LENGTH):
            seen = OPENED[row, : at + 1][MASK[row, : at + 1].bool()]
            if len(seen):
                assert got[row, at] == pytest.approx(float(seen.mean()))


def test_it_remembers_through_a_cache_that_is_reordered_and_cropped() -> None:
    """In steps of 3, 1 and 2 tokens, with beams that change places and a draft that is taken back."""
    whole = opening(Flow(ROWS, MASK), causal=True)(X)
    cache = DynamicCache()
    keys = torch.zeros(ROWS, 1, 3, 1)
    cache.update(keys, keys, 0)
    flow = Flow(ROWS, MASK[:, :3], memory=Memory())
    first = opening(flow, causal=True)(X[:, :3])
    torch.testing.assert_close(first, whole[:, :3])
    carry(cache, flow.memory)  # type: ignore[arg-type]
    assert isinstance(cache, DynamicCache)

    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    draft = Flow(ROWS, MASK[order][:, :4], memory=carried(cache))
    opening(draft, causal=True)(torch.randn(ROWS, 1, D, dtype=torch.float64))
    cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    cache.crop(-1)
    again = Flow(ROWS, MASK[order], memory=carried(cache))
    rest = opening(again, causal=True)(X[order][:, 3:])
    torch.testing.assert_close(rest, whole[order][:, 3:])


def test_a_cache_without_memory_has_a_new_one() -> None:
    assert carried(DynamicCache()).layers == {}
    plain = DynamicCache()
    carry(plain, Memory())
    assert type(plain) is DynamicCache  # nothing to remember
