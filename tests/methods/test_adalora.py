"""AdaLoRA's course: what is important stays, the budget falls by the cube, the penalty is orthogonality's."""

from __future__ import annotations

import pytest
import torch

import veneer
from helpers import perturb, tiny_llama
from veneer.errors import ConfigError
from veneer.methods import method_class
from veneer.methods.adalora import Allocation

IDS = torch.arange(2 * 9).view(2, 9) + 3


def with_course(steps: int = 20, **settings: float) -> tuple[veneer.Adapter, Allocation]:
    chosen = {"rank": 4, "target_rank": 2, "warmup": 0.1, "final": 0.3, "every": 5, **settings}
    adapter = veneer.Base(tiny_llama()).attach(method_class("adalora")(**chosen), "a")
    perturb(adapter)
    course = adapter.method.course({site.path: adapter.parameters_at(site.path) for site in adapter.sites}, steps)
    assert isinstance(course, Allocation)
    return adapter, course


def ranks(adapter: veneer.Adapter) -> int:
    return sum(int(adapter.parameters_at(site.path)["lora_E"].count_nonzero()) for site in adapter.sites)


def test_the_budget_falls_by_the_cube_between_warm_up_and_end() -> None:
    adapter, course = with_course()
    maps = len(adapter.sites)
    assert [course.budget(step) for step in (1, 2, 14, 15, 20)] == [4 * maps, 4 * maps, 2 * maps, 2 * maps, 2 * maps]
    assert course.budget(8) == 2 * maps + int(2 * maps * 0.5**3)


def test_ranks_are_cut_at_their_steps_and_stay_cut() -> None:
    adapter, course = with_course()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    maps, left = len(adapter.sites), []
    for step in range(1, 21):
        adapter(input_ids=IDS).logits.square().mean().backward()
        course.before_step(step)
        optimizer.step()
        course.after_step(step)
        optimizer.zero_grad()
        left.append(ranks(adapter))
    assert left[3] == 4 * maps  # the first cut is at step 5
    assert left[4] == course.budget(5) < 4 * maps
    assert left[13:] == [2 * maps] * 7
    assert len({int(adapter.parameters_at(s.path)["lora_E"].count_nonzero()) for s in adapter.sites}) > 1


def test_what_is_important_stays() -> None:
    """One triple of one map that the loss hangs on, against all others, which it doesn't."""
    adapter, course = with_course(warmup=0, final=0, every=1)
    path = adapter.sites[3].path
    for site in adapter.sites:
        for name, value in adapter.parameters_at(site.path).items():
            value.grad = torch.full_like(value, 1e-3)
            if site.path == path:
                (value.grad[:, 2] if name == "lora_B" else value.grad[2]).fill_(10.0)
    course.before_step(1)
    scores = course._scores(path)
    assert scores.argmax() == 2
    assert scores[2] > max(course._scores(site.path).max() for site in adapter.sites if site.path != path)
    # By hand: mean and spread of the first step are 0.15 |w g| and 0.15 (1 - 0.15) |w g|.
    values = adapter.parameters_at(path)
    now = {name: (value.detach() * value.grad).abs() for name, value in values.items()}
    products = {name: 0.15 * each * (0.15 * (each - 0.15 * each)) for name, each in now.items()}
    expected = products["lora_E"].flatten() + products["lora_A"].mean(1) + products["lora_B"].mean(0)
    assert torch.allclose(scores, expected, rtol=1e-5)


def test_the_penalty_is_none_for_orthogonal_factors() -> None:
    adapter, course = with_course(orthogonality=0.5)
    assert course.penalty().item() > 0.1  # type: ignore[union-attr]
    with torch.no_grad():
        for site in adapter.sites:
            values = adapter.parameters_at(site.path)
            values["lora_A"].copy_(torch.linalg.qr(values["lora_A"].mT).Q.mT)
            values["lora_B"].copy_(torch.linalg.qr(values["lora_B"]).Q)
    assert course.penalty().item() < 1e-5  # type: ignore[union-attr]
    assert with_course(orthogonality=0)[1].penalty() is None


@pytest.mark.parametrize("settings", [{"target_rank": 13}, {"warmup": 0.6, "final": 0.5}])
def test_mistakes(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        method_class("adalora")(**settings)
