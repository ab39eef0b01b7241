"""Faster forms in the places of a base's own computing: on every family the same outputs and gradients; gone after."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import veneer
from helpers import perturb, tiny_llama
from veneer.bases.fast import FAST_SDPA, ROTARY, Fast, sdpa
from veneer.kernels import attention as kernel
from veneer.kernels.attention import attention
from veneer.kernels.native.tiles import there


def learned(adapter: veneer.Adapter, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Loss and all gradients in one vector."""
    adapter.zero_grad()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = adapter(input_ids=ids, labels=labels, attention_mask=mask).loss
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
    assert found == {"LlamaRMSNorm": 61, "LlamaMLP": 30, "LlamaAttention": 30} | ({"Linear": 211} if there() else {})


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

    found = Fast(nn.Sequential(OtherNorm(), OtherLayer()), []).forwards
    assert all(type(module) is nn.Linear for module, _ in found)


def turned_by(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> type[nn.Module]:
    """A module whose forward calls it by transformers' name, as a global of its file."""
    names = {"nn": nn, ROTARY: function}
    exec(f"class Turns(nn.Module):\n    def forward(self, *args):\n        return {ROTARY}(*args)", names)
    return names["Turns"]  # type: ignore[return-value]


def test_rotary_embeddings_of_another_kind_are_left_alone() -> None:
    def halves(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin)

    def neighbours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k = (torch.cat([each[..., ::2], each[..., 1::2]], -1) for each in (q, k))
        return apply_rotary_pos_emb(q, k, cos, sin)

    def part(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        n = cos.shape[-1]
        turned = apply_rotary_pos_emb(q[..., :n], k[..., :n], cos, sin)
        return tuple(torch.cat([each, rest[..., n:]], -1) for each, rest in zip(turned, (q, k), strict=True))

    first, second, third = (turned_by(function)() for function in (halves, neighbours, part))
    forwards = dict(Fast(nn.ModuleList([first, second, third]), []).forwards)
    assert set(forwards) == {first, third}
    x, cos, sin = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    query, _ = forwards[third](x, x, cos, sin)
    assert "Rotary" in type(query.grad_fn).__name__
    expected, got = third(x, x, cos[..., :4], sin[..., :4]), forwards[third](x, x, cos[..., :4], sin[..., :4])
    assert all(map(torch.equal, got, expected))
    assert got[0].shape == x.shape


def test_a_rotary_function_that_is_no_global_is_left_alone() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec(f"class OfSelf(nn.Module):\n    def forward(self, *args):\n        return self.{ROTARY}(*args)", names)
    imported = f"from transformers.models.llama.modeling_llama import {ROTARY}; return {ROTARY}(*args)"
    exec(f"class Imported(nn.Module):\n    def forward(self, *args):\n        {imported}", names)
    assert not Fast(nn.ModuleList([names["OfSelf"](), names["Imported"]()]), []).forwards


def test_a_rotary_function_is_called_as_its_module_calls_it() -> None:
    def one_or_both(q: torch.Tensor, k: Any = None, cos: Any = None, sin: Any = None) -> Any:
        turned = apply_rotary_pos_emb(q, q if k is None else k, cos, sin)
        return turned[0] if k is None else turned

    names: dict[str, Any] = {"nn": nn, ROTARY: one_or_both}
    exec(f"class Turns(nn.Module):\n    def forward(self, x, c, s):\n        return {ROTARY}(q=x, cos=c, sin=s)", names)
    module = names["Turns"]()
    [(_, forward)] = Fast(nn.ModuleList([module]), []).forwards
    x, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    assert torch.equal(forward(x, cos, sin), module(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_the_base_itself(
    dtype: torch.dtype, padded: bool, smollm: veneer.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = smollm if dtype == torch.bfloat16 else veneer.load_base("smollm2-135m-instruct", dtype=dtype)
    used: list[Any] = []
    monkeypatch.setattr(kernel, "attention", lambda *args: used.append(args[3:5]) or attention(*args))
    monkeypatch.setattr(kernel, "GAINS", {torch.float32, torch.bfloat16})
    adapter = base.attach(veneer.LoRA(rank=4), "a")
    perturb(adapter, std=0.02)
    adapter.train()
    ids = torch.randint(100, 40000, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 25:] = 0
    fast = learned(adapter, ids, mask)
    assert used == 30 * [(None, True)]  # padding at the ends needs no mask
    with monkeypatch.context() as patch:
        patch.setattr(base._execution, "fast", None)
        plain = learned(adapter, ids, mask)
    assert len(used) == 30
    off = (fast - plain).norm() / plain.norm()
    assert off < (1e-5 if dtype == torch.float32 else 0.05)
    assert untouched(base.model)


@pytest.mark.parametrize("kind", ["ends", "starts", "gap", "window", "all"])
def test_masks_that_hide_more_than_padding_at_the_ends_are_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    monkeypatch.setattr(kernel, "attention", lambda *args: used.append(args[3:5]) or attention(*args))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask = mask if kind == "all" else mask.tril()
    if kind == "window":
        mask = mask.triu(-2)
    else:
        mask[1, ..., {"ends": slice(4, None), "starts": slice(2), "gap": slice(2, 4), "all": slice(0)}[kind]] = False
    q, k, v = (torch.randn(2, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    result, _ = sdpa(nn.Module(), q, k, v, mask)
    [(kept, causal)] = used
    assert (kept is None, causal) == ((True, True) if kind == "ends" else (False, False))
    plain = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    off = (result - plain.transpose(1, 2)).abs()
    if kind == "ends":
        off[1, 4:] = 0  # what padding sees
    assert off.nan_to_num(0).max() < 0.03


def test_a_mask_that_was_written_into_is_looked_at_again() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sdpa(nn.Module(), q, k, v, mask)
    mask[..., 2:4, :2] = False
    result, _ = sdpa(nn.Module(), q, k, v, mask)
    plain = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    assert (result - plain.transpose(1, 2)).abs().max() < 0.03


def test_masks_of_keys_from_elsewhere_are_kept() -> None:
    cross = nn.Module()
    cross.is_causal = False  # type: ignore[assignment]
    mask = (torch.arange(6) == 0).expand(1, 1, 6, 6)  # one token and padding, seen by six queries
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    result, _ = sdpa(cross, q, k, v, mask)
    assert torch.equal(result, v[:, :, :1].expand(-1, -1, 6, -1).transpose(1, 2))


def test_masks_are_not_looked_at_where_torch_attends_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.bases.fast._only_pads", lambda mask: pytest.fail("looked at"))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))  # 16-bit products alone are faster
    sdpa(nn.Module(), q, k, v, mask)


def test_a_base_that_was_trained_on_can_be_pickled(model: nn.Module) -> None:
    base = veneer.Base(model)
    learned(base.attach(veneer.LoRA(rank=2), "a"), torch.tensor([[5, 7, 2]]))
    base.detach("a")
    again = pickle.loads(pickle.dumps(base))
    recognised = [type(module).__name__ for module, _ in again._execution.fast.forwards]
    assert "LlamaAttention" in recognised


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
