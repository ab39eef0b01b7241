from __future__ import annotations

import torch
import torch.nn.functional as F

from veneer.deltas import LowRank


def random_delta(dtype: torch.dtype = torch.float64, scale: float = 1.7) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, generator=generator, dtype=dtype)
    b = torch.randn(7, 3, generator=generator, dtype=dtype)
    return LowRank(a, b, scale)


def test_apply_adds_the_scaled_product() -> None:
    delta = random_delta()
    x, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(delta.apply(x, y), y + 1.7 * x @ (delta.B @ delta.A).T, rtol=0, atol=1e-12)


def test_merging_equals_applying_for_a_rectangular_weight_with_bias() -> None:
    delta = random_delta()
    weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    before = weight.clone()
    merged = delta.merge_into({"weight": weight, "bias": bias})
    plain, adapted = F.linear(x, weight, bias), delta.apply(x, F.linear(x, weight, bias))
    assert (adapted - plain).abs().max() > 1e-3
    assert set(merged) == {"weight"}
    torch.testing.assert_close(F.linear(x, merged["weight"], bias), adapted, rtol=0, atol=1e-12)
    assert torch.equal(weight, before)


def test_merging_rounds_once() -> None:
    """Into bf16: the exact sum, rounded; not a rounded change added to a rounded weight."""
    delta = random_delta(torch.float32)
    weight = torch.randn(7, 5).bfloat16()
    exact = weight.double() + 1.7 * delta.B.double() @ delta.A.double()
    assert torch.equal(delta.merge_into({"weight": weight})["weight"], exact.bfloat16())


def test_dropout_zeroes_inputs_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    delta = LowRank(torch.eye(4), torch.eye(4), 1.0, dropout=0.5)
    y = delta.apply(torch.ones(2000, 4), torch.zeros(2000, 4))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.05


def test_costs() -> None:
    delta = random_delta(torch.float32)
    assert delta.nbytes == 4 * (3 * 5 + 7 * 3)
    assert delta.flops_per_token == 2 * 3 * (5 + 7)
