"""The faster forms of common computations: outputs and gradients of the plain ones, and nothing more kept than said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import attention as attention_kernel
from veneer.kernels import cross_entropy, native
from veneer.kernels.again import to_keep
from veneer.kernels.attention import attention
from veneer.kernels.cross_entropy import cross_entropy_sum
from veneer.kernels.gated import gated
from veneer.kernels.low_rank import add_low_rank, low_rank_linears
from veneer.kernels.rms_norm import rms_norm
from veneer.kernels.rotary import rotary

EXACT = 1e-10


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, to be learned."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def compared(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Equal outputs and gradients."""
    results = []
    for function in (ours, plain):
        output = function(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= EXACT * theirs.abs().max()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_PRODUCT", 20 * 17)
    monkeypatch.setattr(cross_entropy, "_CACHED", 3 * 17)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy(bias: bool) -> None:
    hidden, weight, shift = numbers(43, 8), numbers(17, 8, seed=1), numbers(17, seed=2)
    targets = torch.randint(0, 17, (43,), generator=torch.Generator().manual_seed(3))
    inputs = (hidden, weight, shift) if bias else (hidden, weight)

    def ours(hidden: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return cross_entropy_sum(hidden, weight, shift, targets)[0]

    def plain(hidden: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, shift), targets, reduction="sum")

    compared(ours, plain, *inputs)


@pytest.mark.usefixtures("small_chunks")
def test_hits_are_those_of_argmax_where_logits_are_equal() -> None:
    weight = numbers(17, 8, seed=1).detach()
    weight[9] = weight[4]
    hidden = numbers(200, 8).detach()
    logits = hidden @ weight.t()
    targets = logits.argmax(1)
    assert (targets == 4).any()
    targets[targets == 4] = 9  # just as great, but not the first
    targets[::3] = 0
    _, hits = cross_entropy_sum(hidden, weight, None, targets)
    assert int(hits) == int((logits.argmax(1) == targets).sum())


def test_cross_entropy_rounds_like_the_plain_one() -> None:
    hidden, weight = numbers(300, 64, dtype=torch.bfloat16), numbers(1000, 64, seed=1, dtype=torch.bfloat16)
    targets = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(3))
    exact = torch.autograd.grad(
        F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum"), (hidden, weight)
    )
    plain = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    theirs = torch.autograd.grad(plain, (hidden, weight))
    loss, _ = cross_entropy_sum(hidden, weight, None, targets)
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert torch.allclose(loss, plain, rtol=1e-6)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - truth).norm() <= 1.1 * (other.double() - truth).norm()


def test_no_gradients_are_computed_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = cross_entropy._loss
    monkeypatch.setattr(
        cross_entropy, "_loss", lambda *args, gradient: asked.append(gradient) or plain(*args, gradient=gradient)
    )
    hidden, weight, targets = numbers(4, 8), numbers(5, 8), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        cross_entropy_sum(hidden, weight, None, targets)
    cross_entropy_sum(hidden.detach(), weight.detach(), None, targets)
    cross_entropy_sum(hidden, weight.detach(), None, targets)
    assert asked == [False, False, True]


MASKS = {
    "none": None,
    "padding": torch.arange(9)[None, :] < torch.tensor([9, 5, 7])[:, None],
    "one for all": torch.arange(9)[None, None, :].expand(1, 9, 9) > 2,
}


def seen(name: str) -> Tensor | None:
    """``[rows or 1, 1, 9 or 1, 9]``."""
    mask = MASKS[name]
    return None if mask is None else mask[:, None] if mask.dim() == 3 else mask[:, None, None]


@pytest.mark.parametrize("elements", [1, 1 << 20])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("mask", "causal"), [("none", False), ("none", True), ("padding", False), ("one for all", False)]
)
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_attention(
    mask: str, causal: bool, groups: int, scale: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernel, "_ELEMENTS", elements)
    monkeypatch.setattr(attention_kernel, "_BLOCK", 4)
    query, key, value = numbers(3, 4, 9, 16), numbers(3, groups, 9, 16, seed=1), numbers(3, groups, 9, 16, seed=2)
    where = seen(mask)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (each.repeat_interleave(4 // groups, 1) for each in (key, value))
        return F.scaled_dot_product_attention(query, key, value, where, is_causal=causal, scale=scale)

    compared(lambda *given: attention(*given, where, causal, scale), plain, query, key, value)
    if where is not None:
        added = torch.zeros_like(where, dtype=torch.float64).masked_fill_(~where, float("-inf"))
        compared(lambda *given: attention(*given, added, causal, scale), plain, query, key, value)


def test_a_query_that_sees_nothing_gives_nothing_and_harms_nobody() -> None:
    query, key, value = numbers(2, 2, 5, 8), numbers(2, 2, 5, 8, seed=1), numbers(2, 2, 5, 8, seed=2)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 1] = False
    output = attention(query, key, value, mask, False, 0.5)
    assert (output[0, :, 1] == 0).all()
    ours = torch.autograd.grad(output.square().sum(), (query, key, value))
    mask[0, :, 1] = True
    other = F.scaled_dot_product_attention(query, key, value, scale=0.5)
    weights = torch.ones_like(other)
    weights[0, :, 1] = 0
    theirs = torch.autograd.grad((other.square() * weights).sum(), (query, key, value))
    for mine, their in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, their)


@pytest.mark.parametrize("loud", [1.0, 6.0])
def test_attention_in_16_bits(loud: float) -> None:
    """Within a few roundings of the exact one, also where scores are far from zero."""
    query, key, value = (
        (numbers(2, 3, 64, 64, seed=seed).detach() * (loud if seed < 2 else 1)).bfloat16().requires_grad_()
        for seed in range(3)
    )
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    truth = F.scaled_dot_product_attention(*exact, is_causal=True)
    output = attention(query, key, value, None, True, 0.125)
    assert (output.double() - truth).norm() < 0.01 * truth.norm()
    for mine, theirs in zip(
        torch.autograd.grad(output.float().square().sum(), (query, key, value)),
        torch.autograd.grad(truth.square().sum(), exact),
        strict=True,
    ):
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_low_rank() -> None:
    x, y = numbers(2, 7, 12), numbers(2, 7, 10, seed=1)
    a, b = numbers(3, 12, seed=2), numbers(10, 3, seed=3)
    compared(lambda *given: add_low_rank(*given, 1.7), lambda x, y, a, b: y + 1.7 * (x @ a.t()) @ b.t(), x, y, a, b)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (2, 3)])
def test_low_rank_gives_each_its_gradient_alone(which: tuple[int, ...]) -> None:
    inputs = [numbers(4, 12), numbers(4, 10, seed=1), numbers(3, 12, seed=2), numbers(10, 3, seed=3)]
    whole = torch.autograd.grad(add_low_rank(*inputs, 0.5).square().sum(), inputs)  # type: ignore[call-arg]
    alone = [each.detach().requires_grad_(place in which) for place, each in enumerate(inputs)]
    output = add_low_rank(*alone, 0.5)  # type: ignore[call-arg]
    for place, found in zip(which, torch.autograd.grad(output.square().sum(), [alone[i] for i in which]), strict=True):
        assert torch.equal(found, whole[place])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outs", [(10,), (10, 6, 4)])
def test_low_rank_with_its_maps(biased: bool, outs: tuple[int, ...]) -> None:
    """Ranks and scales of their own; each gets its gradient also where nothing else does, or an output is not used."""
    n, scales = len(outs), [1.7, 1.0, 0.5][: len(outs)]
    x = numbers(2, 7, 12)
    a = [numbers(3 + i, 12, seed=i + 1) for i in range(n)]
    b = [numbers(out, 3 + i, seed=i + 5) for i, out in enumerate(outs)]
    weights = [numbers(out, 12, seed=out).detach() for out in outs]
    biases = [numbers(out, seed=out + 1).detach() if biased else None for out in outs]

    def ours(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return low_rank_linears(x, weights, biases, factors[:n], factors[n:], scales)

    def plain(x: Tensor, *factors: Tensor) -> list[Tensor]:
        maps = zip(weights, biases, factors[:n], factors[n:], scales, strict=True)
        return [F.linear(x, weight, bias) + scale * (x @ a.t()) @ b.t() for weight, bias, a, b, scale in maps]

    compared(lambda *given: torch.cat(ours(*given), -1), lambda *given: torch.cat(plain(*given), -1), x, *a, *b)
    last = [lambda x, own, out, of=of: of(x, *a[:-1], own, *b[:-1], out)[-1] for of in (ours, plain)]
    compared(*last, x, a[-1], b[-1])
    unused = torch.autograd.grad(ours(x, *a, *b)[-1].sum(), [a[0], b[0]], allow_unused=True)
    assert (unused == (None, None)) == (n > 1)  # as without us: an optimiser leaves it alone
    written = [each.mul_(2) for each in ours(x, *a, *b)]  # as OLMo clamps its queries
    assert torch.allclose(torch.cat(written, -1), 2 * torch.cat(plain(x, *a, *b), -1))
    assert [each.shape for each in ours(x[:0], *a, *b)] == [(0, 7, out) for out in outs]  # an expert without tokens
    whole = torch.autograd.grad(sum(each.square().sum() for each in ours(x, *a, *b)), [x, *a, *b])
    for place, expected in enumerate(whole):
        alone = [each.detach().requires_grad_(at == place) for at, each in enumerate([x, *a, *b])]
        (found,) = torch.autograd.grad(sum(each.square().sum() for each in ours(*alone)), alone[place])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_rms_norm(rounded: bool) -> None:
    x, weight = numbers(3, 5, 16), numbers(16, seed=1).detach()

    def plain(x: Tensor) -> Tensor:
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    compared(lambda x: rms_norm(x, weight, 1e-5, rounded=rounded), plain, x)


@pytest.mark.parametrize("act", [F.silu, F.gelu, torch.relu])
def test_gated(act: Callable[[Tensor], Tensor]) -> None:
    compared(lambda g, u: gated(g, u, act), lambda g, u: act(g) * u, numbers(3, 5, 16), numbers(3, 5, 16, seed=1))


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def test_what_is_kept_for_the_backward() -> None:
    x, weight = numbers(64, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16)
    assert kept(lambda: rms_norm(x, weight, 1e-5, rounded=True)) <= x.nbytes + weight.nbytes + 64 * 4
    up = numbers(64, 256, seed=1, dtype=torch.bfloat16)
    assert kept(lambda: gated(x, up, F.silu)) == x.nbytes + up.nbytes
    a, b, y = (numbers(*shape, dtype=torch.bfloat16) for shape in ((4, 256), (32, 4), (64, 32)))
    assert kept(lambda: add_low_rank(x, y, a, b, 1.0)) == x.nbytes + a.nbytes + b.nbytes + 64 * 4 * 2
    weight, out = torch.randn(64, 256, dtype=torch.bfloat16), numbers(64, 4, dtype=torch.bfloat16)
    with native.plain():
        found = kept(lambda: low_rank_linears(x, [weight], [None], [a], [out], [1.0])[0])
    assert found == x.nbytes + a.nbytes + out.nbytes + 64 * 4 * 2
    vocabulary = torch.randn(5000, 256, dtype=torch.bfloat16)
    targets = torch.zeros(64, dtype=torch.int64)
    assert kept(lambda: cross_entropy_sum(x, vocabulary, None, targets)[0]) == x.nbytes
    q = numbers(2, 4, 32, 16, dtype=torch.bfloat16)
    assert kept(lambda: attention(q, q, q, None, False, 0.25)) == 2 * q.nbytes + 2 * 4 * 32 * 4


ONES = torch.linspace(0.5, 1.5, 256, dtype=torch.float64)
"""A norm's weight."""


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (lambda x, up: gated(x, up, F.silu), lambda x, up: F.silu(x) * up),
        (lambda x, _: rms_norm(x, ONES, 1e-5, rounded=True), lambda x, _: F.rms_norm(x, [256], ONES, 1e-5)),
    ],
)
def test_what_can_be_computed_again_is_not_kept(ours: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    x, up, a, b = numbers(64, 256), numbers(64, 256, seed=1), numbers(4, 256, seed=2), numbers(32, 4, seed=3)
    weight = torch.randn(32, 256, dtype=torch.float64)

    def changed(x: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linears(ours(x, up) + 0 * up.sum(), [weight], [None], [a], [b], [2.0])[0]

    def again(x: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linears(ours(x, up), [weight], [None], [a], [b], [2.0])[0] + 0 * up.sum()

    def reference(x: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = plain(x, up)
        return F.linear(y, weight) + 2 * (y @ a.T) @ b.T + 0 * up.sum()

    inputs = (x, up, a, b)
    compared(again, reference, *inputs)
    assert kept(lambda: changed(*inputs)) - kept(lambda: again(*inputs)) == x.nbytes


def test_what_somebody_wrote_into_is_kept() -> None:
    x, a, b = numbers(8, 16), numbers(2, 16, seed=1), numbers(4, 2, seed=2)
    ones, weight = torch.ones(16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linears(rms_norm(x, ones, 1e-5, rounded=True).mul_(3), [weight], [None], [a], [b], [2.0])[0]

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = 3 * F.rms_norm(x, [16], ones, 1e-5)
        return F.linear(y, weight) + 2 * (y @ a.T) @ b.T

    compared(ours, plain, x, a, b)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_computed_again_is_the_very_same(dtype: torch.dtype, rounded: bool) -> None:
    x, up = numbers(8, 16, dtype=dtype), numbers(8, 16, seed=1, dtype=dtype)
    for weight in (torch.linspace(0.5, 1.5, 16, dtype=dtype), torch.linspace(0.5, 1.5, 16)):
        for y in (rms_norm(x, weight, 1e-5, rounded=rounded), gated(x, up, F.silu)):
            compute, sources = to_keep(y)
            assert all(each is not y for each in sources)
            assert torch.equal(compute(*sources), y)


@pytest.mark.parametrize("which", ["output", "source"])
def test_what_somebody_wrote_into_is_not_computed_again(which: str) -> None:
    x = numbers(8, 16)
    source = x * 1
    y = gated(source, source, F.silu)
    with torch.no_grad():
        (y if which == "output" else source).mul_(2)
    (alone,) = to_keep(y)[1]
    assert alone is y


def test_attention_is_left_to_torch_where_it_could_not_be_the_same() -> None:
    query = numbers(2, 4, 9, 16, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    assert attention_kernel.suits(query, query, query, mask, False)
    assert not attention_kernel.suits(query, query, query, mask[..., :1], False)  # one for all keys
    assert not attention_kernel.suits(query, query, query, mask.float().requires_grad_(), False)
    assert not attention_kernel.suits(query[:, :, :3], query, query, None, True)
    assert not attention_kernel.suits(query.detach(), query.detach(), query.detach(), None, False)


def test_rotary() -> None:
    cos, sin = numbers(2, 1, 5, 8, seed=1).detach(), numbers(2, 1, 5, 8, seed=2).detach()

    def plain(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    compared(lambda x: rotary(x, cos, sin), plain, numbers(2, 3, 5, 8))
    x, *angles = (each.bfloat16() for each in (numbers(2, 3, 5, 8), cos, sin))
    cos, sin = angles
    assert torch.equal(rotary(x, cos, sin), plain(x))
