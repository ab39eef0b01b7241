"""The forms in C beside the plain ones: the same numbers, or as near to the exact ones; and what happens without them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import Called
from native_forms import CHANCE, DTYPES, as_near, compiled, errors, numbers, tiled
from veneer.kernels import native, native_attention
from veneer.kernels.attention import attention
from veneer.kernels.frozen import frozen_linear
from veneer.kernels.gated import gated
from veneer.kernels.low_rank import low_rank_linears
from veneer.kernels.native import attention as operations_attention
from veneer.kernels.native import build, operations, tiles
from veneer.kernels.rms_norm import rms_norm
from veneer.kernels.rotary import rotary
from veneer.kernels.scaled import scaled


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Which forms suit depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@compiled
def test_they_are_there() -> None:
    assert native.there(), native.state()


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("width", [576, 37])
def test_rms_norm(dtype: torch.dtype, rounded: bool, width: int) -> None:
    weight = numbers(width, seed=1).to(dtype)
    norm = functools.partial(rms_norm, eps=1e-5, rounded=rounded)
    as_near(lambda x: norm(x, weight.to(x.dtype)), [numbers(4, 9, width)], dtype, "rms_norm", "rms_norm_backward")
    sparse = numbers(4, 2 * width, 9).to(dtype).mT[..., ::2].requires_grad_()  # not dense
    (dx,) = torch.autograd.grad(norm(sparse, weight).sum(), sparse)
    copy = sparse.detach().contiguous().requires_grad_()
    assert torch.equal(dx, torch.autograd.grad(norm(copy, weight).sum(), copy)[0])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [F.silu, torch.nn.SiLU(), functools.partial(F.gelu, approximate="tanh")])
def test_gated(dtype: torch.dtype, act: Callable[[Tensor], Tensor]) -> None:
    inputs = [4 * numbers(5, 7, 67), numbers(5, 7, 67, seed=1)]
    as_near(lambda gate, up: gated(gate, up, act), inputs, dtype, "gated", "gated_backward")


def maps(n: int, width: int, outs: Sequence[int], biased: bool = False) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of the first maps."""
    weights = [numbers(out, width, seed=out) / width**0.5 for out in outs[:n]]
    return weights, [numbers(out, seed=out + 1) if biased else None for out in outs[:n]]


def changed(weights: Sequence[Tensor], biases: Sequence[Tensor | None], wide: bool = False) -> Callable[..., Tensor]:
    """Their outputs beside each other, of x and the factors A, then B."""
    n = len(weights)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        own = [each.to(x.dtype) for each in weights], [each if each is None else each.to(x.dtype) for each in biases]
        given = [each.float() if wide and x.dtype == torch.bfloat16 else each for each in factors]
        return torch.cat(low_rank_linears(x, *own, given[:n], given[n:], [2.0, 1.0, 0.5][:n]), -1)

    return run


OUTS, RANKS = (64, 32, 96), (16, 3, 40)  # the last by tiles in float32, too


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [(3, 41), (1, 1), (256,)])
@pytest.mark.parametrize("n", [1, 3])
def test_low_rank(n: int, rows: tuple[int, ...], biased: bool, wide: bool, dtype: torch.dtype) -> None:
    """Also of few rows, ranks that fill no tile, and more maps than one."""
    inputs = [numbers(*rows, 160), *(numbers(rank, 160, seed=1) / 13 for rank in RANKS[:n])]
    inputs += [numbers(out, rank, seed=2) for out, rank in zip(OUTS[:n], RANKS[:n], strict=True)]
    run = changed(*maps(n, 160, OUTS, biased), wide)
    few = CHANCE if rows == (1, 1) else 1e-8
    as_near(run, inputs, dtype, "low_rank_linears", "low_rank_linears_backward", chance=few)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_in_several_panels_at_once(dtype: torch.dtype) -> None:
    """More columns than are laid out at once, more rows than are multiplied at once."""
    inputs = [numbers(700, 1024), numbers(16, 1024, seed=1) / 32, numbers(2048, 16, seed=2)]
    as_near(changed(*maps(1, 1024, [2048])), inputs, dtype, "low_rank_linears", "low_rank_linears_backward")


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 33])
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_low_rank_is_the_same_by_any_number_of_threads(threads: int, rank: int, dtype: torch.dtype) -> None:
    inputs = [numbers(100, 64).to(dtype), numbers(rank, 64, seed=1).to(dtype), numbers(352, rank, seed=2).to(dtype)]
    run, before, found = changed(*maps(1, 64, [352])), torch.get_num_threads(), []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            given = [each.requires_grad_() for each in inputs]
            found.append(torch.autograd.grad(run(*given).square().sum(), given))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_gives_each_its_gradient_alone(dtype: torch.dtype) -> None:
    """Also where nothing else needs one, or some outputs are not used."""
    x = numbers(50, 64).to(dtype)
    a = [numbers(rank, 64, seed=rank).to(dtype) for rank in RANKS]
    b = [numbers(out, rank, seed=out).to(dtype) for out, rank in zip(OUTS, RANKS, strict=True)]
    weights = [each.to(dtype) for each in maps(3, 64, OUTS)[0]]

    def loss(which: Sequence[int], x: Tensor, *factors: Tensor) -> Tensor:
        outputs = low_rank_linears(x, weights, 3 * [None], factors[:3], factors[3:], [2.0, 1.0, 0.5])
        return sum((outputs[at].float().square().sum() for at in which), torch.zeros(()))

    for which in ((0, 1, 2), (0, 2), (1,)):
        given = [each.detach().requires_grad_() for each in (x, *a, *b)]
        whole = torch.autograd.grad(loss(which, *given), given, allow_unused=True)
        assert [each is not None for each in whole] == [True] + 2 * [at in which for at in range(3)]
        for place, expected in enumerate(whole):
            if expected is not None:
                alone = [each.detach().requires_grad_(at == place) for at, each in enumerate(given)]
                assert torch.equal(torch.autograd.grad(loss(which, *alone), alone[place])[0], expected)
        with native.plain():
            plain = torch.autograd.grad(loss(which, *given), given, allow_unused=True)
        for mine, other in zip(whole, plain, strict=True):
            assert mine is None or (mine - other).norm() <= 0.02 * other.norm()


@tiled
@pytest.mark.parametrize("which", [(0,), (0, 2), (1, 2), (0, 1, 2)])
def test_low_rank_counts_its_operations(which: Sequence[int]) -> None:
    given = [numbers(50, 64), numbers(16, 64, seed=1), numbers(96, 16, seed=2)]
    x, a, b = (each.bfloat16().requires_grad_(at in which) for at, each in enumerate(given))
    weight = numbers(96, 64, seed=3).bfloat16()
    with FlopCounterMode(display=False) as counter:
        low_rank_linears(x, [weight], [None], [a], [b], [2.0])[0].sum().backward()
    thin_in, thin_out, whole = 64 * 16, 16 * 96, 64 * 96
    backward = {0: whole + thin_in, 1: thin_in, 2: thin_out}
    products = thin_in + whole + thin_out + thin_out + sum(backward[each] for each in which)
    assert counter.get_total_flops() == 2 * 50 * products


@tiled
def test_low_rank_keeps_factors_as_they_are() -> None:
    x, weight = numbers(64, 256).bfloat16(), numbers(32, 256).bfloat16()
    a, b = numbers(4, 256).float().requires_grad_(), numbers(32, 4).float().requires_grad_()
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_linears(x, [weight], [None], [a], [b], [1.0])
    own = {each.data_ptr() for each in (x, a, b)}
    assert own < set(found)
    assert sum(size for at, size in found.items() if at not in own) == 64 * 32 * 2


@tiled
def test_low_rank_gives_gradients_that_keep_nothing_else() -> None:
    x, weights = numbers(9, 64).bfloat16(), [each.bfloat16() for each in maps(2, 64, OUTS)[0]]
    a = [numbers(rank, 64).float().requires_grad_() for rank in RANKS[:2]]
    b = [numbers(out, rank).float().requires_grad_() for out, rank in zip(OUTS, RANKS[:2], strict=False)]
    for each in low_rank_linears(x, weights, [None, None], a, b, [1.0, 1.0]):
        each.sum().backward(retain_graph=True)
    assert all(each.grad.untyped_storage().nbytes() == each.nbytes for each in (*a, *b))


@tiled
@pytest.mark.parametrize("wrong", ["x", "weight", "a", "b", "bias"])
def test_low_rank_of_shapes_that_do_not_fit_is_an_error(wrong: str) -> None:
    shapes = {"x": (8, 64), "weight": (96, 64), "a": (4, 64), "b": (96, 4), "bias": (96,)}
    given = {name: numbers(*shape).bfloat16() for name, shape in shapes.items()}
    given[wrong] = given[wrong][..., :32] if wrong != "b" else given[wrong][:, :2]
    with Called() as called, pytest.raises(RuntimeError, match=r"shape|size|expand"):
        low_rank_linears(given["x"], [given["weight"]], [given["bias"]], [given["a"]], [given["b"]], [1.0])
    assert not called.names


@tiled
def test_low_rank_of_other_maps_is_left_to_torch() -> None:
    def run(
        width: int, out: int, dtype: torch.dtype, x: Tensor | None = None, weight: Tensor | None = None,
        factors: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        x = numbers(8, width).to(dtype) if x is None else x
        weight = numbers(out, width).to(dtype) if weight is None else weight
        a, b = numbers(4, width).to(factors or dtype).requires_grad_(), numbers(out, 4).to(factors or dtype)
        low_rank_linears(x, [weight], [None], [a], [b], [1.0])[0].sum().backward()

    with Called() as called:
        run(48, 64, torch.bfloat16)
        run(64, 40, torch.bfloat16)
        run(64, 64, torch.float64)
        run(64, 64, torch.float32, factors=torch.bfloat16)
        run(64, 64, torch.bfloat16, x=numbers(0, 64).bfloat16())
        run(64, 64, torch.bfloat16, weight=numbers(64, 64).bfloat16().T)
    assert not called.names


@tiled
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rows", "width", "out"),
    [
        (torch.float32, (3, 41), 160, 96),
        (torch.float32, (5,), 37, 50),
        (torch.float32, (300,), 1000, 700),
        (torch.bfloat16, (3, 41), 160, 96),
        (torch.bfloat16, (300,), 992, 704),
    ],
)
def test_frozen(rows: tuple[int, ...], width: int, out: int, biased: bool, dtype: torch.dtype) -> None:
    """Widths that fill no tile, and some that are gone through in parts."""
    weight, bias = (numbers(out, width, seed=1) / width**0.5).to(dtype), numbers(out, seed=2).to(dtype)

    def run(x: Tensor) -> Tensor:
        return frozen_linear(x, weight.to(x.dtype), bias.to(x.dtype) if biased else None)

    as_near(run, [numbers(*rows, width)], dtype, "product")


@tiled
def test_frozen_keeps_rows_apart() -> None:
    """Also where what comes back fills no tile."""
    x, weight = numbers(32, 64).float().requires_grad_(), numbers(50, 64, seed=1).float()
    gradient = torch.ones(32, 50)
    gradient[1, 0] = float("inf")
    (dx,) = torch.autograd.grad(frozen_linear(x, weight, None), x, gradient)
    assert dx.isfinite().all(1).nonzero().flatten().tolist() == [0, *range(2, 32)]


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_corners(dtype: torch.dtype) -> None:
    """Of a larger matrix, as methods have them that share one: its rows are further apart than they are long."""
    weight = numbers(128, 160, seed=1)
    as_near(lambda x: frozen_linear(x, weight.to(x.dtype)[:96, :64], None), [numbers(41, 64)], dtype, "product")


@tiled
def test_frozen_of_other_maps_is_left_to_torch() -> None:
    x, weight, bias = numbers(3, 64).float().requires_grad_(), numbers(32, 64).float(), numbers(32).float()
    expected = F.linear(x, weight, bias)
    with Called() as called:
        found = [
            frozen_linear(x, weight.clone().requires_grad_(), bias),
            frozen_linear(x, weight, bias.clone().requires_grad_()),
            frozen_linear(x, numbers(64, 32).float().copy_(weight.T).T, bias),
        ]
        frozen_linear(x[:0], weight, bias)
        frozen_linear(x.bfloat16()[:, :20], weight.bfloat16()[:, :20].contiguous(), None)
        frozen_linear(x.bfloat16(), torch.zeros(8160, 64, dtype=torch.bfloat16), None)
        frozen_linear(x.bfloat16(), torch.zeros(50, 64, dtype=torch.bfloat16), None)
        with pytest.raises(RuntimeError, match="shape"):
            frozen_linear(x[:, :32], weight, bias)
        with native.plain():
            frozen_linear(x, weight, bias)
    assert not called.names
    assert all(map(torch.equal, found, 3 * [expected]))


@compiled
def test_other_activations_are_left_as_they_are() -> None:
    hooked = torch.nn.SiLU()
    gated(numbers(3, 8).bfloat16(), numbers(3, 8).bfloat16(), hooked)  # as it was before somebody hooked it
    hooked.register_forward_hook(lambda module, args, y: 0 * y)
    for act in (torch.relu, F.gelu, torch.tanh, lambda x: F.silu(x).clamp(max=30), hooked):
        _, called = errors(lambda gate, up, act=act: gated(gate, up, act) + up, 2 * [numbers(3, 8)], DTYPES[1])
        assert not called


@compiled
def test_shapes_that_do_not_fit_are_left_to_the_plain_forms() -> None:
    x = numbers(3, 8).float()
    with Called() as called:
        assert rms_norm(x, torch.ones(1), 1e-5, rounded=True).shape == (3, 8)
        assert gated(x, x[:, :1], F.silu).shape == (3, 8)
        assert rms_norm(x[:0], torch.ones(8), 1e-5, rounded=True).shape == (0, 8)
        assert rms_norm(x[:, :0], torch.ones(0), 1e-5, rounded=True).shape == (3, 0)
    assert not called.names
    spread = torch.linspace(0.5, 2, 16)[::2]
    assert torch.equal(rms_norm(x, spread, 1e-5, rounded=True), rms_norm(x, spread.contiguous(), 1e-5, rounded=True))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 41, 37), (70, 300), (1, 8)])
def test_scaled(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    bias = numbers(shape[-1], seed=2) if biased else None

    def run(x: Tensor, v: Tensor) -> Tensor:
        own = v.float() if x.dtype != torch.float64 else v
        return scaled(x, own, None if bias is None else bias.to(dtype).to(x.dtype))

    inputs = [numbers(*shape), 1 + numbers(shape[-1], seed=1) / 10]
    as_near(run, inputs, dtype, "scaled", "scaled_backward", chance=CHANCE)
    x = numbers(*shape).to(dtype)
    assert torch.equal(run(x, torch.ones(shape[-1])), x)
    given = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(run(given, torch.full(shape[-1:], 0.5)).sum(), given)  # alone
    assert torch.equal(dx, torch.full_like(x, 0.5))


@compiled
def test_scaled_by_others_is_left_to_torch() -> None:
    x = numbers(3, 8).float()
    with Called() as called:
        scaled(x, torch.ones(8, dtype=torch.float64))
        scaled(x, torch.ones(1))
        scaled(x, torch.ones(8), torch.zeros(()))
        scaled(x, torch.ones(8), torch.zeros(8).requires_grad_()).sum().backward()
    assert not called.names


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_rotary(dtype: torch.dtype, rows: int) -> None:
    angles = numbers(rows, 1, 11, 24, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(x: Tensor) -> Tensor:
        return rotary(x.transpose(1, 2), cos.to(x.dtype), sin.to(x.dtype))

    as_near(turned, [numbers(3, 11, 5, 24)], dtype, "rotary")
    x = numbers(3, 11, 5, 24).bfloat16()
    if dtype == torch.bfloat16:
        with native.plain():
            plain = turned(x)
        assert torch.equal(turned(x), plain)


MASKS = {
    "none": lambda: None,
    "bool": lambda: numbers(3, 1, 70, 70, seed=7) > -0.5,
    "by head": lambda: numbers(1, 6, 70, 70, seed=7),
    "padding": lambda: (torch.arange(70) < torch.tensor([70, 31, 9])[:, None])[:, None, None],
}


@compiled
@pytest.mark.parametrize(("mask", "causal"), [("none", True), *((name, False) for name in MASKS)])
@pytest.mark.parametrize(("groups", "scale"), [(2, 0.25), (6, 0.3)])
def test_attention(mask: str, causal: bool, groups: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_attention, "_BLOCK", 32)
    monkeypatch.setattr(native_attention, "_SCORES", 2 * 6 * 32 * 70)
    where = MASKS[mask]()

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        added = where if where is None or where.dtype == torch.bool else where.to(query.dtype)
        return attention(*(each.transpose(1, 2) for each in (query, key, value)), added, causal, scale)

    inputs = [numbers(3, 70, heads, 16, seed=heads + at) for at, heads in enumerate((6, groups, groups))]
    as_near(attended, inputs, torch.bfloat16, "powers", "change", "divided")


TILED = "attention", "attention_backward"


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (31, 31), (70, 70), (300, 300), (40, 161), (161, 40)])
def test_attention_by_tiles(queries: int, keys: int, groups: int, dtype: torch.dtype) -> None:
    """Fewer places than a tile has, more than are taken at once, and keys of their own number."""
    inputs = [numbers(2, queries, 6, 32), numbers(2, keys, groups, 32, seed=1), numbers(2, keys, groups, 32, seed=2)]
    for causal in {False, queries == keys}:

        def attended(*heads: Tensor, causal: bool = causal) -> Tensor:
            return attention(*(each.transpose(1, 2) for each in heads), None, causal, 0.3)

        as_near(attended, inputs, dtype, *TILED, chance=CHANCE if keys == 2 else 1e-8)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 256])
def test_attention_by_tiles_of_wider_heads(width: int, dtype: torch.dtype) -> None:
    inputs = [numbers(2, 3, 50, width, seed=seed) for seed in range(3)]
    as_near(lambda *heads: attention(*heads, None, True, width**-0.5), inputs, dtype, *TILED)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_tiles_of_scores_far_apart(dtype: torch.dtype) -> None:
    """Sums of exponentials that are far from one, and none too large to be a number."""
    inputs = [30 * numbers(2, 3, 50, 32), 30 * numbers(2, 3, 50, 32, seed=1), numbers(2, 3, 50, 32, seed=2)]
    as_near(lambda *heads: attention(*heads, None, True, 0.2), inputs, dtype, *TILED)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_tiles_of_scores_far_below_nought(causal: bool, dtype: torch.dtype) -> None:
    """What stands for places that are not there, whose scores are nought, is no number to multiply by nought."""
    inputs = [3 + numbers(2, 3, 50, 32), -3 + numbers(2, 3, 50, 32, seed=1), numbers(2, 3, 50, 32, seed=2)]
    as_near(lambda *heads: attention(*heads, None, causal, 0.5), inputs, dtype, *TILED)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_tiles_with_a_scale_below_nought(dtype: torch.dtype) -> None:
    inputs = [3 * numbers(2, 3, 50, 32, seed=seed) for seed in range(3)]
    as_near(lambda *heads: attention(*heads, None, True, -0.5), inputs, dtype, *TILED)


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_tiles_shows_what_is_no_number(dtype: torch.dtype) -> None:
    heads = [numbers(2, 3, 50, 32, seed=seed).to(dtype) for seed in range(3)]
    heads[0][0, 1, 7, 3] = float("nan")
    output, _ = operations_attention.attention(*heads, True, 0.2)
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 1, 7]]


@tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_tiles_is_the_same_by_any_number_of_threads(dtype: torch.dtype) -> None:
    heads = [numbers(3, 4, 150, 32, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            with Called() as called:
                output = attention(*heads, None, True, 0.2)
                found.append((output, *torch.autograd.grad(output.square().sum(), heads)))
            assert called.names == set(TILED)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@tiled
def test_attention_by_tiles_counts_its_operations() -> None:
    query, key, value = (numbers(2, heads, 50, 32).bfloat16().requires_grad_() for heads in (6, 2, 2))
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value, None, True, 0.2).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 6 * 50 * 50 * 32


@tiled
def test_attention_by_tiles_of_other_heads_is_left_to_others() -> None:
    with Called() as called:
        for shape in ((2, 3, 50, 24), (2, 3, 50, 288), (1, 1, 50, 32)):  # the last: one head for two threads
            heads = [numbers(*shape, seed=seed).bfloat16().requires_grad_() for seed in range(3)]
            attention(*heads, None, True, 0.2).sum().backward()
        heads = [numbers(2, 3, 50, 32, seed=seed).bfloat16().requires_grad_() for seed in range(3)]
        attention(*heads, torch.zeros(1, 1, 50, 50), False, 0.2).sum().backward()
    assert not called.names & set(TILED)
    query, key, value = (numbers(2, heads, places, 32).bfloat16() for heads, places in ((3, 50), (2, 50), (2, 50)))
    assert not operations_attention.suits(query, key, value, False)  # three heads in two groups
    query, key, value = (numbers(2, 2, places, 32).bfloat16() for places in (50, 40, 40))
    assert operations_attention.suits(query, key, value, False)
    assert not operations_attention.suits(query, key, value, True)
    assert not operations_attention.suits(query, key, value[..., :30, :], False)


@tiled
def test_without_tiles_an_operation_that_needs_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.function.cache_clear()
    monkeypatch.setattr(tiles, "_offered", lambda: False)
    heads = [numbers(2, 2, 5, 32).bfloat16()] * 3
    assert not operations_attention.suits(*heads, True)
    with pytest.raises(RuntimeError, match="tiles"):
        operations_attention.attention(*heads, True, 0.5)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gives_nothing(dtype: torch.dtype) -> None:
    query, key, value = (numbers(2, 2, 5, 8, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 1] = False
    output = attention(query, key, value, mask, False, 0.5)
    assert (output[0, :, 1] == 0).all()
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert gradient.isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype) -> None:
    x = numbers(3, 64).to(dtype)
    x[1, 5] = float("nan")
    y = operations.rms_norm(x, torch.ones(64), 1e-5, True)[0]
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert operations.gated(x, x, 0).isnan().nonzero().tolist() == [[1, 5]]
    losses, _ = operations.cross_entropy(x.clone(), torch.tensor([1, 2, 3]), True)
    assert losses.isnan().tolist() == [False, True, False]


@compiled
def test_bits_do_not_depend_on_threads() -> None:
    x, up = numbers(50, 96).bfloat16(), numbers(50, 96, seed=1).bfloat16()
    q = numbers(3, 4, 50, 16).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norm, scores = operations.rms_norm(x, torch.ones(96), 1e-5, True), numbers(3, 4, 50, 50).bfloat16()
            sums = operations.powers(scores, None, 0, 0.5)
            found.append([*norm, operations.gated(x, up, 0), scores, sums, operations.dots(q, q)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing has been compiled or loaded yet."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    build._attempt.cache_clear()
    yield tmp_path
    build._attempt.cache_clear()


@compiled
def test_a_damaged_object_is_compiled_again(anew: Path) -> None:
    path = anew / "native" / f"{build._key(build._command())}.so"
    path.parent.mkdir()
    path.write_bytes(b"torn")
    assert native.there(), native.state()
    assert path.stat().st_size > 10_000


@compiled
def test_nothing_is_loaded_that_others_can_write(anew: Path) -> None:
    (anew / "native").mkdir()
    (anew / "native").chmod(0o777)
    assert not native.there()
    assert "written by others" in native.state()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("CC", "false", "false failed"),
        ("CC", "gcc -fno-such-flag", "fno-such-flag"),
        ("CC", "no-such-compiler", "no-such-compiler"),
        ("PATH", "", "no C compiler"),
        ("VENEER_NATIVE", "0", "VENEER_NATIVE"),
    ],
)
def test_without_a_compiler_the_plain_forms_run(
    anew: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(name, value)
    assert not native.there()
    assert told in native.state()
    assert not list(anew.glob("native/*.so"))
    found, called = errors(lambda g, u: gated(g, u, F.silu), [numbers(3, 8), numbers(3, 8, seed=1)], torch.float32)
    assert not called
    assert max(found) < 1e-6
