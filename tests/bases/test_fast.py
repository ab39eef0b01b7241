"""Faster forms in the places of a base's own computing: on every family the same outputs and gradients; gone after."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import veneer
from helpers import perturb, tiny_llama
from veneer.bases.fast import FAST_SDPA, Fast
from veneer.kernels import attention as kernel
from veneer.kernels.attention import attention


def learned(adapter: veneer.Adapter, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Loss and all gradients in one vector."""
    adapter.zero_grad()
    loss = adapter(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *gradients])


def untouched(model: nn.Module) -> bool:
    """Nothing of the faster forms is there."""
    return (
        not any("forward" in vars(module) for module in model.modules()) and model.config._attn_implementation == "sdpa"
    )


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama(num_hidden_layers=2)


def test_what_is_recognised(smollm: veneer.Base) -> None:
    found = Counter(type(module).__name__ for module, _ in Fast(smollm.model, [smollm.model.config]).forwards)
    assert found == {"LlamaRMSNorm": 61, "LlamaMLP": 30}


def test_modules_that_compute_something_else_are_left_alone(model: nn.Module) -> None:
    class OtherNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps).clamp(min=1)

    class OtherLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    assert not Fast(nn.Sequential(OtherNorm(), OtherLayer()), []).forwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_the_base_itself(
    dtype: torch.dtype, padded: bool, smollm: veneer.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = smollm if dtype == torch.bfloat16 else veneer.load_base("smollm2-135m-instruct", dtype=dtype)
    used: list[str] = []
    monkeypatch.setattr(kernel, "attention", lambda *args: used.append("attention") or attention(*args))
    monkeypatch.setattr(kernel, "GAINS", {torch.float32, torch.bfloat16})
    adapter = base.attach(veneer.LoRA(rank=4), "a")
    perturb(adapter, std=0.02)
    adapter.train()
    ids = torch.randint(100, 40000, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 25:] = 0
    fast = learned(adapter, ids, attention_mask=mask)
    assert len(used) == 30
    with monkeypatch.context() as patch:
        patch.setattr(base._execution, "fast", None)
        plain = learned(adapter, ids, attention_mask=mask)
    assert len(used) == 30
    off = (fast - plain).norm() / plain.norm()
    assert off < (1e-5 if dtype == torch.float32 else 0.05)
    assert untouched(base.model)


def test_only_where_gradients_are_computed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    base = veneer.Base(model)
    switched: list[bool] = []
    monkeypatch.setattr(Fast, "on", lambda self: switched.append(True) or (lambda: None))
    adapter = base.attach(veneer.LoRA(), "a")
    ids = torch.arange(6)[None] + 3
    with torch.no_grad():
        adapter(input_ids=ids)
    base.model(input_ids=ids)
    assert not switched
    adapter(input_ids=ids)
    assert switched


def test_nothing_stays_when_a_forward_fails(model: nn.Module) -> None:
    base = veneer.Base(model)
    adapter = base.attach(veneer.LoRA(), "a").train()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: seen.append((vars(module).get("forward"), model.config._attn_implementation)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        adapter(input_ids=torch.arange(6)[None] + 3)
    assert seen[0][0] is not None
    assert seen[0][1] == FAST_SDPA
    assert untouched(model)
    handle.remove()
    adapter(input_ids=torch.arange(6)[None] + 3).logits.sum().backward()
    assert untouched(model)


def test_checkpointing_recomputes_by_the_same_forms(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GAINS", {torch.float32})
    base = veneer.Base(model)
    adapter = base.attach(veneer.LoRA(rank=4), "a")
    perturb(adapter, std=0.1)
    adapter.train()
    ids = torch.arange(12).view(2, 6) + 3
    plain = learned(adapter, ids)
    base.enable_checkpointing()
    again = learned(adapter, ids)
    assert torch.allclose(plain, again, rtol=1e-6, atol=1e-7)
    assert untouched(model)


def test_a_norm_that_is_learned_gets_its_gradient(model: nn.Module) -> None:
    base = veneer.Base(model)
    adapter = base.attach(veneer.methods.method_class("norm")(), "a").train()
    learned(adapter, torch.arange(12).view(2, 6) + 3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_a_forward_put_there_by_somebody_else_is_kept(model: nn.Module) -> None:
    base = veneer.Base(model)
    layer, calls = model.model.layers[0].mlp, []
    own = layer.forward
    layer.forward = lambda x: calls.append(1) or own(x)  # as libraries do that move modules between devices
    adapter = base.attach(veneer.LoRA(), "a").train()
    adapter(input_ids=torch.arange(6)[None] + 3).logits.sum().backward()
    assert calls == [1]
    assert "forward" in vars(layer)


def test_trying_what_a_module_computes_calls_nobodys_hooks(model: nn.Module) -> None:
    base = veneer.Base(model)
    adapter = base.attach(veneer.LoRA(), "a").train()
    calls: list[int] = []
    for projection in ("gate_proj", "down_proj"):
        getattr(model.model.layers[0].mlp, projection).register_forward_hook(lambda *_: calls.append(1))
    adapter(input_ids=torch.arange(6)[None] + 3)
    assert calls == [1, 1]


def test_under_autocast(model: nn.Module) -> None:
    """Products in 16 bits over a base in 32: as without the faster forms, but for rounding."""
    base = veneer.Base(model)
    adapter = base.attach(veneer.LoRA(rank=4), "a")
    perturb(adapter, std=0.1)
    adapter.train()
    ids = torch.arange(12).view(2, 6) + 3
    with torch.autocast("cpu", torch.bfloat16):
        fast = learned(adapter, ids)
        base._execution.fast = None
        plain = learned(adapter, ids)
    assert (plain - learned(adapter, ids)).norm() > 0  # autocast does something
    assert (fast - plain).norm() < 0.02 * plain.norm()
