"""What a prefix means: keys and values that real tokens before the text would have had give their very result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, IDS
from test_contract import EXACT, off

import veneer
from veneer.errors import ConfigError
from veneer.methods import method_class

BEFORE = 3
CAUSAL = [name for name, family in FAMILIES.items() if family.generates]
# One layer: there, what tokens before the text give as keys and values does not depend on the text.
ENCODERS = {
    "bert": "encoder.layer.0.attention.self.{}",
    "roberta": "encoder.layer.0.attention.self.{}",
    "distilbert": "transformer.layer.0.attention.{}_lin",
    "electra": "encoder.layer.0.attention.self.{}",
    "deberta-v2": "encoder.layer.0.attention.self.{}_proj",
    "deberta-v3": "encoder.layer.0.attention.self.{}_proj",
    "xlnet": "",
    "t5": "encoder.block.0.layer.0.SelfAttention.{}",
}


def with_prefix(base: veneer.Base, keys: list[torch.Tensor], values: list[torch.Tensor]) -> veneer.Adapter:
    """A prefix adapter with these keys and values ``[tokens, heads, width]``, a pair a layer."""
    adapter = base.attach(method_class("prefix")(length=BEFORE), "a").double()
    table = [each.flatten(1) for pair in zip(keys, values, strict=True) for each in pair]
    table += [torch.zeros_like(table[0])] * (2 * len(adapter.sites) - len(table))  # a decoder's, not looked at
    with torch.no_grad():
        adapter.get_parameter("prompt_embeddings").copy_(torch.cat(table, 1))
    return adapter


@pytest.mark.parametrize("name", CAUSAL)
def test_in_a_decoder_it_is_a_cache(name: str) -> None:
    base = veneer.Base(FAMILIES[name].model().requires_grad_(False))
    one = IDS[:1]
    with torch.no_grad():
        whole = base.model(input_ids=one).logits
        cache = base.model(input_ids=one[:, :BEFORE], use_cache=True).past_key_values
        layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
        adapter = with_prefix(base, [key for key, _ in layers], [value for _, value in layers])
        assert off(adapter(input_ids=one[:, BEFORE:]).logits, whole[:, BEFORE:]) < EXACT
        assert off(base.model(input_ids=one[:, BEFORE:]).logits, whole[:, BEFORE:]) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_in_one_layer_of_an_encoder_it_is_tokens_before(name: str) -> None:
    model = one_layer(name)
    base = veneer.Base(model)
    encoder: Any = model.get_encoder() if name == "t5" else base.backbone
    one = IDS[:1]
    with torch.no_grad():
        whole, key, value = keys_and_values(name, encoder, one)
        site = base.sites.attention[0]
        split = [each[0, :BEFORE].double().unflatten(-1, (site.heads, site.head_width)) for each in (key, value)]
        with_prefix(base, split[:1], split[1:])
        plain = encoder(input_ids=one[:, BEFORE:]).last_hidden_state
        with base.using("a"):
            adapted = encoder(input_ids=one[:, BEFORE:]).last_hidden_state
    assert off(plain, whole[:, BEFORE:]) > 1e-3
    assert off(adapted, whole[:, BEFORE:]) < EXACT


def one_layer(name: str) -> torch.nn.Module:
    """The family's model with its first layer only; XLNet without positions, which its prefix has none of."""
    model = FAMILIES[name].model().requires_grad_(False)
    for module in model.modules():
        for child, layers in module.named_children():
            if isinstance(layers, torch.nn.ModuleList) and child in ("layer", "block") and name != "t5":
                setattr(module, child, layers[:1])
            if child == "encoder" and name == "t5":
                layers.block = layers.block[:1]
    if name == "xlnet":
        torch.nn.init.zeros_(model.transformer.layer[0].rel_attn.r)
    return model


def keys_and_values(name: str, encoder: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The encoder's states, and keys and values ``[rows, tokens, heads · width]`` of its only layer."""
    if name == "xlnet":
        attention, states = encoder.layer[0].rel_attn, encoder.word_embedding(ids)
        key, value = (torch.einsum("bih,hnd->bind", states, p).flatten(2) for p in (attention.k, attention.v))
        return encoder(input_ids=ids).last_hidden_state, key, value
    seen: dict[str, torch.Tensor] = {}
    short = {"t5": ("k", "v"), "distilbert": ("k", "v")}.get(name, ("key", "value"))
    path = ENCODERS[name].removeprefix("encoder.") if name == "t5" else ENCODERS[name]

    def keep(which: str) -> Any:
        def first(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            seen.setdefault(which, output)

        return first

    handles = [encoder.get_submodule(path.format(which)).register_forward_hook(keep(which)) for which in short]
    whole = encoder(input_ids=ids).last_hidden_state
    for handle in handles:
        handle.remove()
    return whole, seen[short[0]], seen[short[1]]


def test_a_networks_width_without_a_network() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    for method in (method_class("prefix")(mlp_width=64), method_class("ptuning2")(mlp_width=64)):
        with pytest.raises(ConfigError, match=r"method\.mlp_width: .* has none without mlp: true"):
            base.attach(method, "a")
    trained = base.attach(method_class("prefix")(mlp=True, mlp_width=8, length=2), "a")
    trained.settle()  # which keeps the width it had
    assert trained.method.mlp is False  # type: ignore[attr-defined]
    assert base.attach(method_class("mam")(mlp=False, bottleneck=2), "mam").trainable
