"""The base is never harmed; an adapter acts exactly when it should."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import veneer
from helpers import perturb, tiny_bert, tiny_llama
from veneer.deltas import low_rank
from veneer.errors import AdapterError, ConfigError, UnknownName
from veneer.methods import method_class

IDS = torch.arange(2 * 9).view(2, 9) + 3


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def snapshot(base: veneer.Base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def same_state(base: veneer.Base, before: dict[str, torch.Tensor]) -> bool:
    state = base.model.state_dict()
    return list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)


@pytest.fixture(params=[tiny_llama, tiny_bert], ids=["llama", "bert"])
def base(request: pytest.FixtureRequest) -> veneer.Base:
    return veneer.Base(request.param())


def test_identity_at_initialisation_is_bitwise(base: veneer.Base) -> None:
    plain = logits(base.model)
    assert torch.equal(logits(base.attach(veneer.LoRA(rank=4))), plain)


def test_a_frozen_linear_map_and_its_change_are_one_computation(
    base: veneer.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shapes() -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        usual = low_rank.low_rank_linears

        def noted(x: torch.Tensor, weights: Sequence[torch.Tensor], *rest: Any) -> tuple[torch.Tensor, ...]:
            seen.extend(tuple(weight.shape) for weight in weights)
            return usual(x, weights, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(low_rank, "low_rank_linears", noted)
            adapter(input_ids=IDS)
        return seen

    adapter = base.attach(veneer.LoRA(rank=4))
    maps = shapes()
    assert len(maps) >= 2 * 4
    one = next(module for module in base.model.modules() if type(module) is torch.nn.Linear)
    one.weight.requires_grad_(True)
    assert len(shapes()) < len(maps)  # it gets its gradient
    one.weight.requires_grad_(False)
    with torch.no_grad():
        assert not shapes()
    with torch.autocast("cpu", torch.bfloat16):
        assert not shapes()
    base.detach("default")
    assert all("forward" not in module.__dict__ for module in base.model.modules())


def test_base_is_bit_identical_through_attach_train_merge_detach(base: veneer.Base) -> None:
    before, plain = snapshot(base), logits(base.model)
    classes = [type(module) for module in base.model.modules()]
    trainable = [p.requires_grad for p in base.model.parameters()]
    adapter = base.attach(veneer.LoRA(rank=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        adapter.train()
        adapter(input_ids=IDS).logits.square().mean().backward()
        assert all(p.grad is None for name, p in base.model.named_parameters() if "veneer" not in name)
        optimizer.step()
    adapter.eval()
    assert (logits(adapter) - plain).abs().max() > 1e-3
    adapter.merged()
    assert same_state(base, before)
    assert torch.equal(logits(base.model), plain)
    base.detach("default")
    assert same_state(base, before)
    assert [type(module) for module in base.model.modules()] == classes
    assert [p.requires_grad for p in base.model.parameters()] == trainable
    assert not any(m._forward_hooks for m in base.model.modules())


def test_who_acts_when(base: veneer.Base) -> None:
    plain = logits(base.model)
    one, two = base.attach(veneer.LoRA(rank=2), "one"), base.attach(veneer.LoRA(rank=3, targets=["q", "up"]), "two")
    perturb(one, seed=1)
    perturb(two, seed=2)
    first, second = logits(one), logits(two)
    assert (first - plain).abs().max() > 1e-3
    assert (second - first).abs().max() > 1e-3
    assert torch.equal(logits(base.model), plain)
    with base.using("two"):
        assert torch.equal(logits(base.model), second)
        with base.using(None):
            assert torch.equal(logits(base.model), plain)
        assert torch.equal(logits(one), first)
        assert torch.equal(logits(base.model), second)
    base.activate("one")
    assert torch.equal(logits(base.model), first)
    base.detach("one")
    assert torch.equal(logits(base.model), plain)
    assert torch.equal(logits(two), second)


def test_an_exception_leaves_nothing_behind(base: veneer.Base) -> None:
    plain, before = logits(base.model), snapshot(base)
    adapter = base.attach(
        veneer.LoRA(rank=2),
        modules={"classifier": {"weight": torch.ones(5, 32), "bias": torch.ones(5)}}
        if hasattr(base.model, "classifier")
        else None,
    )
    perturb(adapter)
    adapted = logits(adapter)
    broken = base.model.get_submodule(base.sites[9].path)
    handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            adapter(input_ids=IDS)
    handle.remove()
    assert torch.equal(logits(base.model), plain)
    assert torch.equal(logits(adapter), adapted)
    assert same_state(base, before)


def test_lowering_that_fails_leaves_nothing_behind(base: veneer.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(base.model)
    adapter = base.attach(veneer.LoRA(rank=2))
    perturb(adapter)
    adapted = logits(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(veneer.LoRA, "lower", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapter(input_ids=IDS)
    assert torch.equal(logits(base.model), plain)
    assert torch.equal(logits(adapter), adapted)


def test_deep_copy_is_independent(base: veneer.Base) -> None:
    adapter = base.attach(veneer.LoRA(rank=2))
    perturb(adapter)
    adapted = logits(adapter)
    twin = copy.deepcopy(base)
    assert torch.equal(logits(twin["default"]), adapted)
    perturb(twin["default"], seed=7)
    with torch.no_grad():
        next(iter(twin.backbone.parameters())).add_(1)
    assert torch.equal(logits(adapter), adapted)
    assert (logits(twin["default"]) - adapted).abs().max() > 1e-3


def test_merged_equals_adapted() -> None:
    """float64, perturbed weights, non-zero biases, alpha other than rank."""
    for make in (tiny_llama, tiny_bert):
        base = veneer.Base(make().double())
        adapter = base.attach(veneer.LoRA(rank=4, alpha=10)).double()
        perturb(adapter)
        plain, adapted = logits(base.model), logits(adapter)
        assert (adapted - plain).abs().max() > 1e-3
        merged = adapter.merged()
        assert not hasattr(merged, "veneer_adapters")
        assert (logits(merged) - adapted).abs().max() / adapted.abs().max() < 1e-10


def test_head_of_another_size_and_merging_it() -> None:
    base = veneer.Base(tiny_bert().double())
    plain = logits(base.model)
    head = {"classifier": {"weight": torch.randn(5, 32), "bias": torch.randn(5)}}
    adapter = base.attach(veneer.LoRA(rank=2), modules=head).double()
    perturb(adapter)
    assert logits(adapter).shape == (2, 5)
    assert torch.equal(logits(base.model), plain)
    merged, adapted = adapter.merged(), logits(adapter)
    assert (logits(merged) - adapted).abs().max() < 1e-10
    perturb(adapter, seed=5)  # training on changes nothing of what was merged
    assert (logits(merged) - adapted).abs().max() < 1e-10


def test_the_adapter_is_a_module_of_its_own() -> None:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(veneer.LoRA(rank=2))
    assert len(adapter.state_dict()) == 28
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter.state_dict())
    assert inspect.signature(adapter.forward) == inspect.signature(base.model.forward)
    assert not any("veneer" in name for name in base.model.state_dict())
    assert base.model.load_state_dict(base.model.state_dict()).missing_keys == []
    adapter.to(torch.bfloat16)
    assert base.dtype == torch.float32
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    base.model.to(torch.float64)  # the model finds its adapters
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    adapter.train()
    assert base.model.training
    base.model.eval()
    assert not adapter.training


def test_saving_the_model_writes_the_plain_base(tmp_path: object) -> None:
    base = veneer.Base(tiny_llama())
    plain = logits(base.model)
    perturb(base.attach(veneer.LoRA(rank=2)))
    base.model.save_pretrained(tmp_path)
    assert torch.equal(logits(veneer.load_base(tmp_path).model), plain)  # type: ignore[arg-type]


def test_checkpointing_changes_nothing() -> None:
    gradients = []
    for on in (False, True):
        base = veneer.Base(tiny_llama().double())
        adapter = base.attach(veneer.LoRA(rank=2)).double()
        perturb(adapter)
        if on:
            base.enable_checkpointing()
        adapter.train()
        loss = adapter(input_ids=IDS, use_cache=False).logits.square().mean()
        base.activate(None)  # what acts later must not matter to the recomputation
        with base.using(None):
            logits(base.model)
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(veneer.LoRA(rank=4, dropout=0.5))
    perturb(adapter)
    adapter.train()
    assert not torch.equal(logits(adapter), logits(adapter))
    adapter.eval()
    assert torch.equal(logits(adapter), logits(adapter))


def test_seed_decides_and_the_global_state_is_left_alone() -> None:
    base = veneer.Base(tiny_llama())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    same = [
        base.attach(veneer.LoRA(rank=2), name, seed=seed).state_dict() for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(torch.rand(1), expected)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(same[0][key], same[1][key])
    assert not torch.equal(same[0][key], same[2][key])


def test_mistakes(base: veneer.Base) -> None:
    base.attach(veneer.LoRA(rank=2), "support")
    with pytest.raises(AdapterError, match="attached already"):
        base.attach(veneer.LoRA(rank=2), "support")
    with pytest.raises(AdapterError, match="no adapter name"):
        base.attach(veneer.LoRA(rank=2), "a.b")
    with pytest.raises(UnknownName, match=r"No adapter 'suport' here. Did you mean 'support'"), base.using("suport"):
        pass
    with pytest.raises(AdapterError, match="carries adapters of another Base"):
        veneer.Base(base.model)


@pytest.mark.parametrize(
    ("size", "hidden", "layers", "expected"), [("base", 768, 12, 294_912), ("large", 1024, 24, 786_432)]
)
def test_published_counts_roberta(size: str, hidden: int, layers: int, expected: int) -> None:
    """LoRA r = 8 on q and v (Hu et al. 2021, table 2)."""
    import transformers

    config = (
        transformers.RobertaConfig(
            vocab_size=50265,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=16,
            intermediate_size=4 * hidden,
        )
        if size == "large"
        else transformers.RobertaConfig(vocab_size=50265)
    )
    with torch.device("meta"):
        model = transformers.RobertaModel(config)
    assert veneer.Base(model).attach(veneer.LoRA(rank=8, targets=["q", "v"])).trainable == expected


def test_a_part_called_by_itself_acts_inside_the_block_only() -> None:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(veneer.LoRA(rank=2), "a")
    perturb(adapter)
    part, x = base.model.model.layers[0].self_attn.q_proj, torch.ones(1, 3, 32)
    with torch.no_grad():
        plain = part(x)
    adapter.train()
    adapter(input_ids=IDS).logits.sum().backward()  # a training forward leaves nothing in force
    with torch.no_grad():
        assert torch.equal(part(x), plain)
        with base.using("a"):
            assert not torch.equal(part(x), plain)
        assert torch.equal(part(x), plain)


def test_threads_wait_for_one_another() -> None:
    base = veneer.Base(tiny_llama())
    adapters = [base.attach(veneer.LoRA(rank=2), name, seed=seed) for seed, name in enumerate("ab")]
    for seed, adapter in enumerate(adapters):
        perturb(adapter, seed=seed)
    expected = [logits(adapter) for adapter in adapters]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(30):
            if not torch.equal(logits(adapters[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("how", ["in the model", "by the adapter"])
def test_checkpointing_switched_on_elsewhere(how: str) -> None:
    gradients = []
    for on in (False, True):
        base = veneer.Base(tiny_llama(use_cache=False).double())
        adapter = base.attach(method_class("prefix")(length=3)).double()
        perturb(adapter)
        adapter.train()
        if on:
            inside = getattr(base.model, "activation_checkpointing_enable", base.model.gradient_checkpointing_enable)
            switch_on = inside if how == "in the model" else adapter.gradient_checkpointing_enable
            switch_on({"use_reentrant": True})
        with base.using("default"):
            base.model(input_ids=IDS).logits.square().mean().backward()
        gradients.append(adapter.get_parameter("prompt_embeddings").grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10
    assert gradients[0].abs().max() > 0


def test_a_merged_model_trains_as_a_whole_and_forgets_ties() -> None:
    base = veneer.Base(tiny_llama(tie_word_embeddings=True))
    adapter = base.attach(veneer.LoRA(rank=2, targets=["embed_tokens", "q"]))
    perturb(adapter)
    merged = adapter.merged()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not merged.config.tie_word_embeddings
    assert base.model.config.tie_word_embeddings
    assert (logits(merged) - logits(adapter)).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", ["lora", {"rank": 3}, veneer.LoRA])
def test_what_is_no_method(wrong: object) -> None:
    with pytest.raises(AdapterError, match="attach\\(\\) takes a method"):
        veneer.Base(tiny_llama()).attach(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes its settings by name"):
        veneer.LoRA(8)


def test_virtual_tokens_need_ids() -> None:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(method_class("prompt")(length=3))
    with pytest.raises(AdapterError, match="pass input_ids"):
        adapter(inputs_embeds=torch.ones(1, 4, 32))


def test_parameters_keep_their_order_when_they_are_replaced(base: veneer.Base) -> None:
    """Optimisers resumed from a file know parameters by their order: the method's first, then the head's."""
    model = tiny_bert().requires_grad_(False)
    head = {"classifier": {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}}
    adapter = veneer.Base(model).attach(veneer.LoRA(rank=2), "a", modules=head)
    before = [name for name, _ in adapter.named_parameters()]
    adapter.replace(*adapter.state)
    assert [name for name, _ in adapter.named_parameters()] == before
    assert before[-1].endswith("classifier.bias")
