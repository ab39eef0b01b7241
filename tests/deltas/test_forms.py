"""Algebra of the forms, in float64: what each computes, that merging equals applying, that rows mix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.deltas import (
    Bias,
    Bottleneck,
    Delta,
    Fusion,
    InputScale,
    KeyValues,
    Kron,
    LowRank,
    OfWeight,
    Param,
    Replace,
    Rotate,
    Rows,
    Scale,
    ScaledLowRank,
    Sparse,
    Stack,
)  # fmt: skip
from veneer.errors import AdapterError

IN, OUT = 6, 8


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


W, B, X = rand(OUT, IN, seed=100), rand(OUT, seed=100), rand(5, 3, IN)


def rotation(seed: int = 0) -> Rotate:
    skew = rand(2, 3, 3, seed=seed)
    skew = skew - skew.mT
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    return Rotate(torch.linalg.solve(eye + skew, eye - skew))


def sparse(seed: int = 0) -> Sparse:
    return Sparse(torch.tensor([0, 3, 7, 3]), torch.tensor([1, 5, 0, 2]), rand(4, seed=seed))


MERGING = {
    "low-rank": lambda s=0: LowRank(rand(2, IN, seed=s), rand(OUT, 2, seed=s), 1.7),
    "scaled-low-rank": lambda s=0: ScaledLowRank(
        rand(2, IN, seed=s), rand(OUT, 2, seed=s), rand(2, seed=s), rand(OUT, seed=s)
    ),
    "scale": lambda s=0: Scale(rand(OUT, seed=s)),
    "scale without bias": lambda s=0: Scale(rand(OUT, seed=s), bias=B),
    "input scale": lambda s=0: InputScale(rand(IN, seed=s)),
    "bias": lambda s=0: Bias(rand(OUT, seed=s)),
    "kron": lambda s=0: Kron(rand(2, 3, seed=s), (rand(4, 2, seed=s),), 0.7),
    "kron of a product": lambda s=0: Kron(rand(2, 3, seed=s), (rand(4, 1, seed=s), rand(1, 2, seed=s)), 0.7),
    "sparse": sparse,
    "param": lambda s=0: Param({"weight": rand(OUT, IN, seed=s), "bias": rand(OUT, seed=s + 1)}),
    "function of the weight": lambda s=0: OfWeight(lambda w: w * (1 + rand(OUT, IN, seed=s))),
    "replace": lambda s=0: Replace({"weight": rand(OUT, IN, seed=s)}),
    "rotation": rotation,
    "low-rank, then magnitude": lambda s=0: Stack(
        [LowRank(rand(2, IN, seed=s), rand(OUT, 2, seed=s), 1.7), Scale(rand(OUT), bias=B)]
    ),
    "low-rank, then rotation, then input scale": lambda s=0: Stack(
        [LowRank(rand(2, IN, seed=s), rand(OUT, 2, seed=s), 1.7), rotation(s), InputScale(rand(IN, seed=s))]
    ),
    "scale, then sparse": lambda s=0: Stack([Scale(rand(OUT, seed=s)), sparse(s)]),
}
UP = {"up": rand(OUT, 3), "down": rand(3, OUT)}


def bottleneck(seed: int = 0) -> Bottleneck:
    return Bottleneck(
        rand(3, OUT, seed=seed), rand(3, seed=seed), rand(OUT, 3, seed=seed), rand(OUT, seed=seed), torch.tanh, 0.6
    )


def run(delta: Delta, x: Tensor) -> Tensor:
    """A linear map under a delta."""
    parameters = {"weight": W, "bias": B} | dict(delta.effective({"weight": W, "bias": B}))
    return delta.apply(x, F.linear(delta.before(x), parameters["weight"], parameters["bias"]))


@pytest.mark.parametrize("form", MERGING)
def test_merging_equals_applying(form: str) -> None:
    delta = MERGING[form]()
    kept = W.clone(), B.clone()
    merged = {"weight": W, "bias": B} | delta.merge_into({"weight": W, "bias": B})
    assert (run(delta, X) - F.linear(X, W, B)).abs().max() > 1e-3
    torch.testing.assert_close(F.linear(X, merged["weight"], merged["bias"]), run(delta, X), rtol=0, atol=1e-10)
    assert torch.equal(W, kept[0])
    assert torch.equal(B, kept[1])
    assert delta.nbytes > 0 or isinstance(delta, OfWeight)  # whose function holds what it holds


def test_treatment_of_the_bias() -> None:
    """IA3's scale scales it, DoRA's magnitude doesn't."""
    v = rand(OUT)
    torch.testing.assert_close(run(Scale(v), X), v * F.linear(X, W, B))
    torch.testing.assert_close(run(Scale(v, bias=B), X), v * F.linear(X, W) + B)


def test_kron_is_the_kronecker_product_and_a_rotation_keeps_lengths() -> None:
    delta = Kron(rand(2, 3), (rand(4, 2),), 0.7)
    expected = F.linear(X, W, B) + 0.7 * X @ torch.kron(delta.C, delta.factors[0]).T
    torch.testing.assert_close(run(delta, X), expected)
    torch.testing.assert_close(rotation().before(X).norm(dim=-1), X.norm(dim=-1))


def test_fusion() -> None:
    y = F.linear(X, W, B)
    one, two = bottleneck(), bottleneck(1)
    zeros, eye = torch.zeros(OUT, OUT).double(), torch.eye(OUT).double()
    even = Fusion([one, two], zeros, torch.zeros(OUT).double(), zeros, torch.zeros(OUT).double(), eye)
    torch.testing.assert_close(even.apply(X, y), (one.apply(X, y) + two.apply(X, y)) / 2)
    sharp = Fusion([one, two], zeros, rand(OUT) * 1e3, eye, torch.zeros(OUT).double(), eye)
    z = torch.stack([one.apply(X, y), two.apply(X, y)], -2) - y.unsqueeze(-2)
    best = (z * sharp.query_bias).sum(-1).argmax(-1)
    chosen = y + z.gather(-2, best[..., None, None].expand(*best.shape, 1, OUT)).squeeze(-2)
    torch.testing.assert_close(sharp.apply(X, y), chosen)


@pytest.mark.parametrize("delta", [bottleneck(), KeyValues(rand(2, 1, 4), rand(2, 1, 4))], ids=["bottleneck", "prefix"])
def test_what_cannot_merge_says_so(delta: Delta) -> None:
    with pytest.raises(AdapterError, match="cannot be merged"):
        delta.merge_into({"weight": W, "bias": B})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", [*MERGING, "bottleneck"])
def test_rows(form: str, axis: int) -> None:
    """Rows 0 and 3 under one delta, row 1 under another of its form, rows 2 and 4 under none."""
    make = MERGING.get(form, bottleneck)
    one, two = make(0), make(5)
    rows = Rows([([0, 3], one), ([1], two)], count=5, axis=axis)
    x = X.transpose(0, axis)
    y = F.linear(rows.before(x), W, B)

    def rerun(delta: Delta, x: Tensor) -> Tensor:
        changed = {"weight": W, "bias": B} | dict(delta.effective({"weight": W, "bias": B}))
        return F.linear(x, changed["weight"], changed["bias"])

    mixed = rows.apply_rows(x, y, rerun).transpose(0, axis)
    torch.testing.assert_close(mixed[[0, 3]], run(one, X[[0, 3]]), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[[1]], run(two, X[[1]]), rtol=0, atol=1e-12)
    assert torch.equal(mixed[[2, 4]], F.linear(x, W, B).transpose(0, axis)[[2, 4]])


def test_attention_to_a_prefix_is_a_mixture() -> None:
    """attn([P; K], [P; V]) = (1 − λ) attn(K, V) + λ attn(P_k, P_v)   (He et al. 2022, eq. 7)."""
    q, k, v, pk, pv = (rand(1, 2, n, 4, seed=n) for n in (3, 5, 5, 2, 2))
    whole = F.scaled_dot_product_attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2))
    scores = [torch.einsum("bhqd,bhkd->bhqk", q, keys) / 2 for keys in (pk, k)]
    parts = [each.exp().sum(-1, keepdim=True) for each in scores]
    share = parts[0] / (parts[0] + parts[1])
    mixture = share * F.scaled_dot_product_attention(q, pk, pv) + (1 - share) * F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(whole, mixture)
