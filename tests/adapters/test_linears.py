"""Linear maps of one input are computed together, and only where the input is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from helpers import perturb, tiny_llama
from veneer.adapters.linears import Siblings
from veneer.deltas import Delta, InputScale, LowRank, Scale, Stack, low_rank
from veneer.methods.dora import DoRA

IDS = torch.arange(2 * 9).view(2, 9) + 3


@pytest.fixture
def adapter() -> veneer.Adapter:
    adapter = veneer.Base(tiny_llama().double()).attach(veneer.LoRA(rank=4))
    adapter.double()
    perturb(adapter)
    return adapter


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many maps were computed at once, each time."""
    seen: list[int] = []
    usual = low_rank.low_rank_linears

    def noted(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        seen.append(len(weights))
        return usual(x, weights, *rest)

    monkeypatch.setattr(low_rank, "low_rank_linears", noted)
    return seen


def learned(adapter: veneer.Adapter) -> list[Tensor]:
    """Logits and gradients."""
    parameters = list(adapter.parameters())
    logits = adapter(input_ids=IDS).logits
    found = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True, materialize_grads=True)
    return [logits.detach(), *found]


def alone(adapter: veneer.Adapter, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The same, each map by itself."""
    usual = Siblings._computed
    with monkeypatch.context() as patched:
        patched.setattr(Siblings, "_computed", lambda self, at, given, _: usual(self, at, given, {at: self.maps[at]}))
        return learned(adapter)


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.allclose(*both, rtol=1e-9, atol=1e-12) for both in zip(ours, theirs, strict=True))


def nothing_is_left(adapter: veneer.Adapter) -> bool:
    found = adapter.base._execution.siblings.values()
    return len(found) > 0 and all(each._given is None and not each._outputs for each in found)


def attention(adapter: veneer.Adapter) -> nn.Module:
    return adapter.base.model.get_submodule("model.layers.0.self_attn")


def test_queries_keys_and_values_are_one_computation_and_so_are_gate_and_value(
    adapter: veneer.Adapter, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = learned(adapter)
    assert groups == [3, 1, 2, 1] * 2
    groups.clear()
    assert close(together, alone(adapter, monkeypatch))
    assert groups == [1] * 14
    assert nothing_is_left(adapter)


@pytest.mark.parametrize(
    ("outer", "taken"),
    [(Scale(torch.linspace(0.5, 2, 5).double()), True), (InputScale(torch.linspace(0.5, 2, 4).double()), False)],
    ids=["of the output", "of the input"],
)
def test_a_stack_is_one_computation_if_the_others_change_outputs_only(
    outer: Delta, taken: bool, groups: list[int]
) -> None:
    x, weight, bias, a, b = (torch.randn(*shape).double() for shape in ((3, 4), (5, 4), (5,), (2, 4), (5, 2)))
    stack = Stack([LowRank(a, b, 2.0), outer])
    found = Stack.linears([stack, stack], x, [weight, -weight], [bias, None])
    assert (found is not None) is taken
    assert groups == ([2] if taken else [])
    for y, own in zip(found or (), ((weight, bias), (-weight, None)), strict=False):
        assert torch.allclose(y, stack.apply(x, nn.functional.linear(stack.before(x), *own)))


def test_dora_is_computed_with_its_maps(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = veneer.Base(tiny_llama().double()).attach(DoRA(rank=4))
    perturb(adapter.double())
    together = learned(adapter)
    assert groups == [3, 1, 2, 1] * 2
    monkeypatch.setattr(Stack, "linears", lambda *args: None)
    assert close(together, learned(adapter))


def test_only_those_an_adapter_acts_at(groups: list[int]) -> None:
    adapter = veneer.Base(tiny_llama()).attach(veneer.LoRA(rank=4, targets=["q", "v"]))
    learned(adapter)
    assert groups == [2] * 2
    adapter.base.detach("default")
    assert not any(each.maps for each in adapter.base._execution.siblings.values())


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x.mul_(2)], ids=["another tensor", "written into"])
def test_a_map_with_an_input_of_its_own(
    adapter: veneer.Adapter, groups: list[int], monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]
) -> None:
    """What somebody's hook makes of it is what counts."""
    usual = adapter(input_ids=IDS).logits
    handle = attention(adapter).k_proj.register_forward_pre_hook(lambda _, x: (change(x[0]),))
    groups.clear()
    together = adapter(input_ids=IDS).logits
    assert not torch.allclose(together, usual)
    monkeypatch.setattr(Siblings, "output", lambda *_: None)
    assert torch.allclose(together, adapter(input_ids=IDS).logits, rtol=1e-9)
    handle.remove()


def test_a_plan_of_another_adapter_has_its_own(adapter: veneer.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside one forward, where an adapter is acting around the values alone."""
    other = adapter.base.attach(veneer.LoRA(rank=2), "other")
    perturb(other, seed=1)
    values = attention(adapter).v_proj
    expected = learned(other)

    def plan_of_other(*_: Any) -> None:
        execution = adapter.base._execution
        plan = execution._plan
        with adapter.base.using("other"):
            execution._plan = execution.lower(execution.flow)  # type: ignore[misc]
        before.append(plan)

    before: list[Any] = []
    first = values.register_forward_pre_hook(plan_of_other, prepend=True)

    def back(*_: Any) -> None:
        adapter.base._execution._plan = before.pop()

    last = values.register_forward_hook(back)
    mixed = learned(adapter)
    assert close(mixed, alone(adapter, monkeypatch))
    assert not torch.allclose(mixed[0], expected[0])
    first.remove()
    last.remove()


def test_an_exception_between_siblings_leaves_nothing(adapter: veneer.Adapter) -> None:
    expected = learned(adapter)
    handle = attention(adapter).k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(input_ids=IDS)
    assert nothing_is_left(adapter)
    handle.remove()
    assert close(learned(adapter), expected)


def test_recomputed_with_checkpoints(adapter: veneer.Adapter, groups: list[int]) -> None:
    expected = learned(adapter)
    adapter.base.enable_checkpointing()
    adapter.train()
    groups.clear()
    assert close(learned(adapter), expected)
    assert groups == [3, 1, 2, 1] * 4
    assert nothing_is_left(adapter)


def test_whatever_was_attached_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are in one order, or their last bits would differ."""
    seen: list[list[torch.Size]] = []
    usual = low_rank.low_rank_linears

    def noted(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        seen.append([weight.shape for weight in weights])
        return usual(x, weights, *rest)

    monkeypatch.setattr(low_rank, "low_rank_linears", noted)
    orders = []
    for before in ([], ["v"]):
        base = veneer.Base(tiny_llama())
        if before:
            base.attach(veneer.LoRA(rank=4, targets=before), "before")
        learned(base.attach(veneer.LoRA(rank=4), "after"))
        orders.append(seen.copy())
        seen.clear()
    assert orders[0] == orders[1]


def set_at_its_call(module: nn.Module) -> None:
    """As torch's own spectral norm does it."""
    module.before = module._parameters.pop("weight").detach()  # type: ignore[union-attr]
    module.weight = module.before
    module.register_forward_pre_hook(lambda own, _: setattr(own, "weight", own.before * 2))


def forward_of_its_own(module: nn.Module) -> None:
    module.__dict__["forward"] = lambda x: nn.Linear.forward(module, x) * 3  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [set_at_its_call, forward_of_its_own])
def test_what_a_map_does_by_itself_only(
    adapter: veneer.Adapter, groups: list[int], monkeypatch: pytest.MonkeyPatch, own: Callable[[nn.Module], None]
) -> None:
    module = attention(adapter).k_proj
    usual = adapter(input_ids=IDS).logits
    own(module)
    groups.clear()
    ours = adapter(input_ids=IDS).logits
    assert groups[0] == 2
    monkeypatch.setattr(Siblings, "output", lambda *_: None)
    assert torch.allclose(ours, adapter(input_ids=IDS).logits, rtol=1e-9)
    assert not torch.allclose(ours, usual)


def test_autocast_around_one_of_them(adapter: veneer.Adapter) -> None:
    values = attention(adapter).v_proj
    adapter.float()
    adapter.base.model.float()
    autocast = torch.autocast("cpu", torch.bfloat16)
    seen: list[torch.dtype] = []

    def begin(*_: Any) -> None:
        autocast.__enter__()

    def end(_: nn.Module, __: Any, y: Tensor) -> None:
        seen.append(y.dtype)
        autocast.__exit__(None, None, None)

    values.register_forward_pre_hook(begin)
    values.register_forward_hook(end, prepend=True)
    adapter(input_ids=IDS)
    assert seen == [torch.bfloat16]


class Positioned(nn.Module):
    """Queries and keys are made of tokens and their positions, values of tokens alone, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        placed = x + torch.arange(8)
        return self.q_proj(placed) + self.k_proj(placed).square() + self.v_proj(x).sin()


def test_values_of_another_input(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    adapter = veneer.Base(Positioned()).attach(veneer.LoRA(rank=2, targets=["q_proj", "k_proj", "v_proj"]))
    perturb(adapter.double())
    x = torch.randn(3, 8, dtype=torch.float64)
    ours = adapter(x)
    assert groups == [3, 1]
    assert nothing_is_left(adapter)
    gradients = torch.autograd.grad(ours.sum(), list(adapter.parameters()))
    monkeypatch.setattr(Siblings, "output", lambda *_: None)
    plain = adapter(x)
    assert close([ours, *gradients], [plain, *torch.autograd.grad(plain.sum(), list(adapter.parameters()))])
