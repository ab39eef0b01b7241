"""What LoRA has beyond the contract: experts, ranks and alphas by pattern, a bias; and its exchange with peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from contracts import method
from families import FAMILIES, run
from test_contract import EXACT, off

import veneer
from helpers import perturb
from veneer.errors import AdapterError, AdapterFileError, TargetError
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"rank": 3, "alpha": 7, "targets": ("experts",)}),
    "experts and attention": ("mixtral", {"rank": 3, "alpha": 7, "targets": ("experts", "q", "v")}),
    "one of the experts' maps": ("mixtral", {"rank": 3, "alpha": 7, "targets": ("experts.down_proj",)}),
    "patterns": (
        "llama",
        {"rank": 3, "alpha": 7, "rank_pattern": {"down": 5, r"/layers\.0\..*q_proj/": 2}, "alpha_pattern": {"v": 11}},
    ),
    "bias": ("llama", {"rank": 3, "alpha": 7, "bias": True}),
    "A frozen": ("llama", {"rank": 3, "alpha": 7, "freeze_a": True}),
    "gaussian": ("bert", {"rank": 3, "alpha": 7, "init": "gaussian"}),
    "bias, GPT-2": ("gpt2", {"rank": 3, "alpha": 7, "bias": True}),
}


def ours_with(name: str) -> tuple[veneer.Adapter, dict[str, torch.Tensor]]:
    family, settings = SETTINGS[name]
    model = FAMILIES[family].model().requires_grad_(False)
    adapter = veneer.Base(model).attach(method_class("lora")(**settings), "a").double()
    return adapter, FAMILIES[family].inputs


@pytest.mark.parametrize("name", SETTINGS)
def test_starts_as_the_base_learns_and_merges(name: str) -> None:
    adapter, inputs = ours_with(name)
    with torch.no_grad():
        plain = run(adapter.base.model, inputs)
        assert torch.equal(run(adapter, inputs), plain)
        perturb(adapter, std=0.2)
        adapted = run(adapter, inputs)
        assert off(adapted, plain) > 1e-3
        if name == "bias":  # Llama's maps have no bias to merge into
            with pytest.raises(AdapterError, match="has none"):
                adapter.merged()
        else:
            assert off(run(adapter.merged(), inputs), adapted) < EXACT
    run(adapter, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert any("lora_A" in key for key, _ in adapter.named_parameters()) == (name != "A frozen")


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_reads_what_we_write(name: str, tmp_path: Path) -> None:
    adapter, inputs = ours_with(name)
    perturb(adapter, std=0.2)
    adapter.save(tmp_path / "ours")
    fresh = FAMILIES[SETTINGS[name][0]].model()
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours", is_trainable=True).double().eval()
    with torch.no_grad():
        plain = run(adapter.base.model, inputs)
    expected = run(theirs, inputs)
    expected.square().mean().backward()
    got = run(adapter, inputs)
    got.square().mean().backward()
    assert off(expected, plain) > 1e-3
    assert off(got, expected) < EXACT
    their_grads = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    grads = {key: p.grad for key, p in adapter.named_parameters()}
    assert set(grads) == {key for key in their_grads if name != "A frozen" or "lora_A" not in key}
    for key, grad in grads.items():
        assert grad is not None
        assert off(grad, their_grads[key]) < EXACT, key


THEIRS = {
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts the other way round": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
    "patterns": ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5, "layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 11}}),
    "bias": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[THEIRS[name][0]], THEIRS[name][1]
    config = peft.LoraConfig(r=3, lora_alpha=7, **settings)  # type: ignore[arg-type]
    theirs = peft.get_peft_model(family.model(), config).double().eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_((torch.randn_like(parameter) * 0.2).float())  # files are read as float32
        expected = run(theirs, family.inputs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.Base(family.model().requires_grad_(False)).load(tmp_path / "theirs").double()
    with torch.no_grad():
        assert off(run(ours.base.model, family.inputs), expected) > 1e-3
        assert off(run(ours, family.inputs), expected) < EXACT


def test_experts_of_rows_mix() -> None:
    family = FAMILIES["mixtral"]
    base = veneer.Base(family.model().requires_grad_(False))
    for seed, name in enumerate(("a", "b")):
        adapter = base.attach(veneer.LoRA(rank=2, targets=("experts", "q")), name, seed=seed).double()
        perturb(adapter, std=0.2, seed=seed)
    batch = {key: torch.cat([value, value.roll(1, -1)]) for key, value in family.inputs.items()}
    names = ["a", None, "b", "a"]
    with torch.no_grad():
        plain = run(base.model, batch)
        with base.rows(names):
            mixed = run(base.model, batch)
        for row, name in enumerate(names):
            with base.using(name):
                alone = run(base.model, {key: value[row : row + 1] for key, value in batch.items()})
            assert off(mixed[row : row + 1], alone) < EXACT
            # Experts group tokens across rows: even a plain row's sums are added up in another order.
            assert (off(mixed[row], plain[row]) < EXACT) == (name is None)


def test_ranks_are_those_of_the_first_pattern_that_picks() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    adapter = base.attach(veneer.LoRA(rank=4, rank_pattern={"down": 6, "mlp": 2}), "a")
    ranks = {site.role: len(adapter.parameters_at(site.path)["lora_A.weight"]) for site in adapter.sites}
    assert ranks == {"q": 4, "k": 4, "v": 4, "o": 4, "gate": 2, "up": 2, "down": 6}


def test_patterns_go_to_peft_as_regular_expressions(tmp_path: Path) -> None:
    adapter, _ = ours_with("patterns")
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"down_proj": 5, r"0\.self_attn\.q_proj": 2}
    assert config["alpha_pattern"] == {"v_proj": 11}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"rank_pattern": {"dwn": 2}}, r"The pattern 'dwn' picks none of the targets. Did you mean 'down'"),
        ("llama", {"rank_pattern": {"experts": 2}}, r"picks none of the targets"),
        ("mixtral", {"targets": "experts", "dropout": 0.1}, r"gate_up_proj has none to itself"),
        ("mixtral", {"targets": "experts", "bias": True}, r"bias is for linear maps"),
        ("llama", {"targets": "experts"}, r"'experts' matches nothing"),
        ("llama", {"targets": ["q", "norm"]}, r"kind norm"),
        ("llama", {"rank_pattern": {"k": 17}}, r"rank 17 is more than these maps can have, which is 16"),
    ],
)
def test_mistakes(family: str, settings: dict[str, Any], message: str) -> None:
    base = veneer.Base(FAMILIES[family].model())
    with pytest.raises(TargetError, match=message):
        base.attach(veneer.LoRA(**{"rank": 2, **settings}), "a")
    assert not base.adapters


@pytest.mark.parametrize("name", ["shira", "oft", "lokr"])
def test_others_refuse_what_they_do_not_act_on(name: str) -> None:
    base = veneer.Base(FAMILIES["mixtral"].model())
    with pytest.raises(TargetError, match=f"{name} acts on sites of kind linear only.*kind experts"):
        base.attach(method_class(name)(**{**method(name).model_dump(), "targets": ("experts",)}), "a")


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_starts_that_cancel(init: str, family: str, tmp_path: Path) -> None:
    """The update is nothing at first though no factor is; then it merges, and comes back from its files."""
    model = FAMILIES[family].model().requires_grad_(False)
    base, inputs = veneer.Base(model), FAMILIES[family].inputs
    adapter = base.attach(veneer.LoRA(rank=4, alpha=7, init=init), "a").double()
    with torch.no_grad():
        plain = run(model, inputs)
        assert off(run(adapter, inputs), plain) < 1e-7  # they are decomposed in float32
        site = adapter.sites[0]
        assert all(value.abs().max() > 1e-3 for value in adapter.parameters_at(site.path).values())
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1
            parameter.copy_((parameter + noise).float())  # as files have them
        adapted = run(adapter, inputs)
        assert off(adapted, plain) > 1e-3
        assert off(run(adapter.merged(), inputs), adapted) < EXACT
        adapter.save(tmp_path / "a")
        assert torch.equal(run(base.load(tmp_path / "a", "again").double(), inputs), adapted)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in adapter.named_parameters()} == {
        "lora_A",
        "lora_B",
    }
    assert not any(name.endswith("start") for name, _ in adapter.named_parameters())


def test_pissa_starts_from_the_principal_part() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    adapter = base.attach(veneer.LoRA(rank=4, alpha=7, init="pissa", targets="q"), "a")
    site = adapter.sites[0]
    values = adapter.parameters_at(site.path)
    weight = base.model.get_submodule(site.path).weight.float()
    u, s, v = torch.linalg.svd(weight)
    product = adapter.method.scale_at(site) * values["lora_B.weight"] @ values["lora_A.weight"]
    assert off(product, (u[:, :4] * s[:4]) @ v[:4]) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "orthogonal", "rank": 3}, "needs an even rank"),
        ({"init": "pissa", "targets": "embed_tokens"}, "of kind embedding"),
    ],
)
def test_mistakes_with_starts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        veneer.Base(FAMILIES["llama"].model()).attach(veneer.LoRA(**settings), "a")


def test_a_start_that_changed_the_base_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(FAMILIES["llama"].model().float(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"pissa.*changed the base"):
        veneer.Base(FAMILIES["llama"].model()).load(tmp_path, "a")
