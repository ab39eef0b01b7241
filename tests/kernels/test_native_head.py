"""Cross-entropy by forms in C: by tiles in one pass over the vocabulary, or of logits that are there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import Called
from native_forms import CHANCE, DTYPES, as_near, compiled, numbers, tiled
from veneer.kernels import cross_entropy
from veneer.kernels.cross_entropy import cross_entropy_sum
from veneer.kernels.native import head, operations


def classes(rows: int, many: int) -> Tensor:
    return torch.randint(0, many, (rows,), generator=torch.Generator().manual_seed(3))


@compiled
@pytest.mark.parametrize("target", [-100, 5])
def test_a_target_that_is_no_class_is_an_error(target: int) -> None:
    with pytest.raises(IndexError, match="5 classes"):
        cross_entropy_sum(numbers(2, 8).float(), numbers(5, 8).float(), None, torch.tensor([0, target]))


@compiled
def test_cross_entropy_of_states_that_lie_otherwise_or_do_not_fit() -> None:
    targets, weight = torch.arange(40), numbers(300, 64, seed=1).float()
    turned = numbers(64, 40).float().T.requires_grad_()
    dense = turned.detach().contiguous().requires_grad_()
    found = [
        torch.autograd.grad(cross_entropy_sum(each, weight, None, targets)[0], each)[0] for each in (turned, dense)
    ]
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="shape"):
        cross_entropy_sum(dense, weight[:, :32].contiguous(), None, targets)
    loss, hits = cross_entropy_sum(dense[:0], weight, None, targets[:0])
    assert loss == 0
    assert hits == 0


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_odd_widths_and_learned_weights(dtype: torch.dtype) -> None:
    targets = classes(40, 301)
    inputs = [3 * numbers(40, 16), numbers(301, 16, seed=1)]
    as_near(lambda h, w: cross_entropy_sum(h, w, None, targets)[0][None], inputs, dtype, "cross_entropy")


@compiled
def test_hits_are_the_first_of_the_greatest() -> None:
    logits = torch.tensor([[1.0, 5, 5, 0], [1.0, 5, 5, 0], [7.0, 5, 5, 0], [0.0, 0, 0, 0]])
    _, hits = operations.cross_entropy(logits.clone(), torch.tensor([1, 2, 0, 3]), False)
    assert hits.tolist() == [1, 0, 1, 0]
    kept = logits.clone()
    operations.cross_entropy(kept, torch.tensor([1, 2, 0, 3]), False)
    assert torch.equal(kept, logits)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "many", "width"), [(1, 5, 32), (40, 5024, 64), (65, 301, 96), (33, 700, 2080)])
def test_by_tiles(rows: int, many: int, width: int, biased: bool, dtype: torch.dtype) -> None:
    targets, weight = classes(rows, many), numbers(many, width, seed=1).to(dtype)
    bias = numbers(many, seed=2).to(dtype) if biased else None

    def loss(h: Tensor) -> Tensor:  # one number: a rounding more or less is chance
        shift = None if bias is None else bias.to(h.dtype)
        return cross_entropy_sum(h, weight.to(h.dtype), shift, targets)[0][None]

    as_near(loss, [3 * numbers(rows, width) / width**0.5], dtype, "head", chance=2 * CHANCE)


@tiled
def test_by_tiles_of_odd_widths() -> None:
    weight, targets = numbers(301, 37, seed=1), classes(40, 301)
    as_near(
        lambda h: cross_entropy_sum(h, weight.to(h.dtype), None, targets)[0][None],
        [numbers(40, 37)],
        torch.float32,
        "head",
    )


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_tiles_rows_come_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, targets = numbers(301, 64, seed=1).to(dtype), classes(150, 301)
    hidden = numbers(150, 64).to(dtype).requires_grad_()
    found = []
    for most in (1 << 20, 50 * 64):
        monkeypatch.setattr(cross_entropy, "_SUMS", most)
        loss, hits = cross_entropy_sum(hidden, weight, None, targets)
        found.append((hits, torch.autograd.grad(loss, hidden)[0]))
    assert all(map(torch.equal, *found))


WIDE = 2080
"""So wide that few classes are gone through together: in float32 32, in bfloat16 64."""


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [1, -1])
def test_by_tiles_of_logits_far_apart(slope: int, dtype: torch.dtype) -> None:
    """Each class is greater by far than those before it, or less: earlier sums shrink to nothing, or later ones are."""
    targets, weight = classes(40, 999), torch.zeros(999, WIDE, dtype=torch.float64)
    weight[:, 0] = slope * torch.arange(999)
    as_near(
        lambda h: cross_entropy_sum(h, weight.to(h.dtype), None, targets)[0][None],
        [numbers(40, WIDE).abs()],
        dtype,
        "head",
        chance=2 * CHANCE,  # of nearly all rows one class is left
    )


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_tiles_little_that_is_left_to_learn_is_exact(dtype: torch.dtype) -> None:
    """Where a target is all but certain, its probability less one would be lost in rounding."""
    weight = numbers(300, 32, seed=1).to(dtype)
    targets = torch.arange(40)
    hidden = weight[:40].clone().requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, None, targets)[0], hidden)
    exact = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(exact @ weight.double().T, targets, reduction="none")
    (theirs,) = torch.autograd.grad(loss.sum(), exact)
    sure = (loss < 1e-3) & (loss > 1e-9)  # what is below is not exact in float64, either
    assert sure.sum() > 5
    apart = (ours.double() - theirs)[sure].norm(dim=1) / theirs[sure].norm(dim=1)
    assert apart.max() < 3 * torch.finfo(dtype).eps + 1e-5  # exponents near 50 are rounded to 1e-5


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_tiles_classes_that_are_ruled_out(dtype: torch.dtype) -> None:
    """By a bias: all of the first ones that are gone through together, and some of the last."""
    weight, bias = numbers(2000, WIDE, seed=1).to(dtype) / 32, torch.zeros(2000, dtype=dtype)
    bias[:1200] = -torch.inf
    bias[1990:] = -torch.inf
    targets = torch.tensor([1200, 1989, 1500, 7])
    hidden = numbers(4, WIDE).to(dtype)
    change, losses, hits = head.head(hidden, weight, bias, targets, True)
    logits = hidden.double() @ weight.double().T + bias
    wanted = F.cross_entropy(logits, targets, reduction="none")
    assert losses[3] == wanted[3] == torch.inf
    torch.testing.assert_close(losses[:3].double(), wanted[:3], rtol=1e-5, atol=1e-6)
    exact = (logits.softmax(1) - F.one_hot(targets, 2000)) @ weight.double()
    assert (change - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
    assert hits.tolist() == (logits.argmax(1) == targets).long().tolist()


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_tiles_hits_are_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    weight, hidden = torch.zeros(900, WIDE, dtype=dtype), torch.ones(7, WIDE, dtype=dtype)
    weight[[5, 7, 150, 400, 899], 0] = 2
    weight[3, 0] = 1.5
    targets = torch.tensor([5, 7, 150, 400, 899, 0, 5])
    hidden[6] = 0  # all are equal: the first is the hit
    _, _, hits = head.head(hidden, weight, None, targets, False)
    assert hits.tolist() == [1, 0, 0, 0, 0, 0, 0]
    _, _, hits = head.head(hidden, weight, None, torch.zeros(7, dtype=torch.int64), False)
    assert hits.tolist() == [0, 0, 0, 0, 0, 0, 1]


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_tiles_shows_what_is_no_number(dtype: torch.dtype) -> None:
    hidden, weight = numbers(40, 64).to(dtype), numbers(301, 64, seed=1).to(dtype)
    hidden[7, 3] = torch.nan
    targets = classes(40, 301)
    targets[7] = 0
    change, losses, hits = head.head(hidden, weight, None, targets, True)
    assert hits[7] == 0
    assert losses.isnan().nonzero().tolist() == [[7]]
    assert change.isnan().any(1).nonzero().tolist() == [[7]]
    assert change[7].isnan().all()


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 150])
def test_by_tiles_is_the_same_by_any_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    hidden, weight, targets = numbers(rows, 64).to(dtype), numbers(2001, 64, seed=1).to(dtype), classes(rows, 2001)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(head.head(hidden, weight, None, targets, True))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(map(torch.equal, found[0], each))


@tiled
def test_by_tiles_no_gradient_is_computed_where_nobody_wants_it() -> None:
    hidden, weight, targets = numbers(40, 64).float(), numbers(301, 64, seed=1).float(), classes(40, 301)
    with FlopCounterMode(display=False) as counter:
        loss, hits = cross_entropy_sum(hidden, weight, None, targets)
    assert counter.get_total_flops() == 2 * 40 * 64 * 301
    assert not loss.requires_grad
    with FlopCounterMode(display=False) as counter:
        again, others = cross_entropy_sum(hidden.requires_grad_(), weight, None, targets)
    assert counter.get_total_flops() == 2 * 2 * 40 * 64 * 301
    assert loss == again
    assert hits == others


@tiled
def test_heads_that_learn_have_logits() -> None:
    hidden, weight, bias = numbers(40, 64).float(), numbers(301, 64, seed=1).float(), numbers(301).float()
    for learned in (weight, bias):
        learned.requires_grad_()
        with Called() as called:
            cross_entropy_sum(hidden, weight, bias, classes(40, 301))[0].backward()
        assert learned.grad is not None
        assert called.names >= {"cross_entropy", "product"}
        assert "head" not in called.names
        learned.requires_grad_(False)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_by_tiles(dtype: torch.dtype) -> None:
    """Of a vocabulary that is summed part by part, where the weight learns."""
    targets = classes(40, 5024)
    inputs = [3 * numbers(40, 64), numbers(5024, 64, seed=1)]
    as_near(lambda h, w: cross_entropy_sum(h, w, None, targets)[0][None], inputs, dtype, "cross_entropy", "product")


@compiled
@pytest.mark.parametrize("width", [8, 32])
def test_as_many_targets_as_rows(width: int) -> None:
    hidden, weight = numbers(40, width).float(), numbers(50, width).float()
    for targets in (39, 41):
        with pytest.raises(ValueError, match="40 positions"):
            cross_entropy_sum(hidden, weight, None, torch.zeros(targets).long())
