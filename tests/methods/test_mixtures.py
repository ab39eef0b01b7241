"""Methods side by side in one adapter: `mix`, its presets, and fusion over trained adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, run

import veneer
from helpers import perturb, tiny_llama
from veneer.errors import AdapterError, TargetError, VeneerError
from veneer.methods import method_class
from veneer.methods.mixture import parameters_of


def attached(name: str, family: str = "llama", adapter: str = "a", **settings: object) -> veneer.Adapter:
    base = veneer.Base(FAMILIES[family].model().requires_grad_(False))
    return base.attach(method_class(name)(**settings), adapter).double()


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "xlnet"])
def test_a_mix_is_its_methods_one_after_the_other(family: str) -> None:
    """LoRA first, prefix beside it, IA3 last: equal to a model into which LoRA is merged, under the other two."""
    members = [{"name": "lora", "rank": 2, "alpha": 5}, {"name": "prefix", "length": 2}, {"name": "ia3"}]
    mixed = attached("mix", family, methods=members)
    perturb(mixed, std=0.3)
    inputs = FAMILIES[family].inputs
    base = veneer.Base(FAMILIES[family].model().requires_grad_(False))
    alone = [base.attach(method, str(index)).double() for index, method in enumerate(mixed.method.members())]
    for index, adapter in enumerate(alone):
        for site in adapter.sites:
            for key, value in adapter.parameters_at(site.path).items():
                value.data.copy_(parameters_of(index, mixed.parameters_at(site.path))[key])
    merged = veneer.Base(alone[0].merged().requires_grad_(False))
    rest = merged.attach(method_class("mix")(methods=members[1:]), "rest").double()
    for site in rest.sites:
        for key, value in rest.parameters_at(site.path).items():
            index, _, name = key.partition(".")
            if site.path in alone[int(index) + 1]._at_sites:  # what is shared is in each
                value.data.copy_(alone[int(index) + 1].parameters_at(site.path)[name])
    with torch.no_grad():
        assert (run(mixed, inputs) - run(base.model, inputs)).abs().max() > 1e-3
        assert (run(mixed, inputs) - run(rest, inputs)).abs().max() < 1e-9


def test_a_mix_of_methods_at_one_weight_merges_in_order() -> None:
    """Those that change the weight itself are inside; the merged weights say the same as the calls."""
    adapter = attached("mix", methods=["shira", {"name": "lora", "rank": 2}, "ia3", "bitfit", "norm", "dora"][:5])
    perturb(adapter, std=0.3)
    inputs = FAMILIES["llama"].inputs
    with torch.no_grad():
        adapted = run(adapter, inputs)
        assert (adapted - run(adapter.base.model, inputs)).abs().max() > 1e-3
        try:
            merged = adapter.merged()
        except AdapterError as error:
            assert "has none" in str(error)
            adapter = attached("mix", methods=["shira", {"name": "lora", "rank": 2}, "ia3", "norm"])
            perturb(adapter, std=0.3)
            adapted, merged = run(adapter, inputs), adapter.merged()
        assert (run(merged, inputs) - adapted).abs().max() < 1e-9


def test_two_prefixes_are_one_longer_prefix() -> None:
    two = attached("mix", methods=[{"name": "prefix", "length": 2}, {"name": "prefix", "length": 3}])
    one = attached("prefix", length=5)
    with torch.no_grad():
        for table in two.parameters():
            table.copy_(torch.randn_like(table))
        next(one.parameters()).copy_(torch.cat(list(two.parameters())))
        assert torch.allclose(run(two, FAMILIES["llama"].inputs), run(one, FAMILIES["llama"].inputs), atol=1e-12)


def test_each_method_of_a_mix_learns_at_its_own_rate() -> None:
    adapter = attached("mix", methods=["lora", {"name": "lora", "b_rate": 16}, "ia3"])
    method = adapter.method
    rates = adapter.rates
    default = {
        0: method_class("lora").learning_rate,
        1: method_class("lora").learning_rate,
        2: method_class("ia3").learning_rate,
    }
    for key, rate in rates.items():
        index = int(key.split(".")[-3 if "lora" in key else -2])
        times = 16 if index == 1 and "lora_B" in key else 1
        assert rate * method.learning_rate == pytest.approx(default[index] * times), key


def test_a_mix_keeps_the_courses_of_its_methods() -> None:
    adapter = attached("mix", methods=[{"name": "lora", "rank": 2}, {"name": "adalora", "rank": 4, "target_rank": 2}])
    course = adapter.method.course({site.path: adapter.parameters_at(site.path) for site in adapter.sites}, 10)
    assert course is not None
    assert course.penalty() is not None
    assert course.state()
    assert all(name.startswith("1.") for name in course.state())
    assert attached("mix", methods=["lora"]).method.course({}, 10) is None


def test_mam_is_a_prefix_and_a_parallel_adapter() -> None:
    """Once trained, without the network that made the prefix, and to the same effect."""
    mam = attached("mam", "bart", length=2, bottleneck=3, mlp_width=5).eval()
    perturb(mam)
    inputs = FAMILIES["bart"].inputs
    with torch.no_grad():
        before = run(mam, inputs)
        mam.settle()
        assert torch.allclose(run(mam, inputs), before, atol=1e-12)
    mix = attached("mix", "bart", methods=[{"name": "prefix", "length": 2}, {"name": "parallel", "bottleneck": 3}])
    assert {k: v.shape for k, v in mam.state_dict().items()} == {k: v.shape for k, v in mix.state_dict().items()}


def test_two_methods_with_virtual_tokens() -> None:
    """One after the other before the input; slots in the input are for one of them only."""
    two = attached("mix", methods=[{"name": "prompt", "length": 2}, {"name": "prompt", "length": 3}])
    one = attached("prompt", length=5)
    with torch.no_grad():
        next(one.parameters()).copy_(torch.cat(list(two.parameters())))
        assert torch.equal(run(two, FAMILIES["llama"].inputs), run(one, FAMILIES["llama"].inputs))


def test_a_parallel_adapter_reads_what_the_branch_reads() -> None:
    """Against the formula on a block whose first and last map have inputs of their own, beside a LoRA there."""
    model = tiny_llama().double().requires_grad_(False)
    base = veneer.Base(model)
    mix = [{"name": "parallel", "bottleneck": 3, "scale": 2.0}, {"name": "lora", "targets": "down", "rank": 2}]
    adapter = base.attach(method_class("mix")(methods=mix), "a").double()
    perturb(adapter, std=0.3)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    own = adapter.parameters_at("model.layers.0.mlp.down_proj")
    inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    plain = mlp.down_proj(inner)
    lora = inner @ own["1.lora_A.weight"].T @ own["1.lora_B.weight"].T * adapter.method.members()[1].alpha / 2
    beside = (x @ own["0.adapter_down.weight"].T + own["0.adapter_down.bias"]).relu()
    beside = (beside @ own["0.adapter_up.weight"].T + own["0.adapter_up.bias"]) * 2
    with torch.no_grad(), adapter.acting():
        assert (mlp(x) - plain).abs().max() > 1e-2
        assert torch.allclose(mlp(x), plain + lora + beside, atol=1e-12)


def trained(folder: Path, count: int = 2) -> tuple[veneer.Base, list[str]]:
    """A base, and folders of Pfeiffer adapters for it."""
    base = veneer.Base(tiny_llama().requires_grad_(False))
    folders = []
    for index in range(count):
        adapter = base.attach(method_class("pfeiffer")(bottleneck=3 + index), f"task{index}")
        perturb(adapter, std=0.3, seed=index)
        adapter.save(folder / f"task{index}")
        folders.append(str(folder / f"task{index}"))
        base.detach(f"task{index}")
    return base, folders


def test_fusion_starts_from_trained_adapters_and_leaves_them_alone(tmp_path: Path) -> None:
    base, folders = trained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    fusion = base.attach(method_class("fusion")(adapters=folders), "both")
    kept = {key: value.clone() for key, value in fusion.state_dict().items() if ".adapter_" in key}
    assert set(base.adapters) == {"both"}
    assert kept
    fusion.train()
    optimizer = torch.optim.AdamW([p for p in fusion.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        fusion(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    fusion.eval()
    assert all(torch.equal(value, fusion.state_dict()[key]) for key, value in kept.items())
    assert all(name.rpartition(".")[0].endswith(("query", "key", "value")) for name, _ in fusion.named_parameters())
    with torch.no_grad():
        before = fusion(input_ids=ids).logits
    fusion.save(tmp_path / "both")
    for folder in folders:
        Path(folder).rename(folder + "-gone")  # the fused folder is whole by itself
    other = veneer.Base(tiny_llama().requires_grad_(False)).load(tmp_path / "both")
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, before)


def test_a_fusion_sure_of_one_adapter_is_that_adapter(tmp_path: Path) -> None:
    base, folders = trained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    fusion = base.attach(method_class("fusion")(adapters=folders), "both")
    one = base.load(folders[1], "one")
    other = base.load(folders[0], "zero")
    with torch.no_grad():
        equal = fusion(input_ids=ids).logits
        assert (equal - one(input_ids=ids).logits).abs().max() > 1e-3
        assert (one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() > 1e-3
        # Fusing an adapter with itself gives that adapter, whatever the weights.
        base.load(folders[1], "copy")
        twice = base.attach(method_class("fusion")(adapters=["one", "copy"]), "twice")
        assert torch.allclose(twice(input_ids=ids).logits, one(input_ids=ids).logits, atol=1e-4)


def test_the_pull_of_fusion(tmp_path: Path) -> None:
    base, folders = trained(tmp_path)
    fusion = base.attach(method_class("fusion")(adapters=folders, pull=0.5), "both")
    course = fusion.method.course({site.path: fusion.parameters_at(site.path) for site in fusion.sites}, 10)
    assert course.penalty().item() == 0
    with torch.no_grad():
        fusion.parameters_at(fusion.sites[0].path)["value.weight"][0, 1] += 3
    assert course.penalty().item() == pytest.approx(0.5 * 9)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("mix", {}, "methods"),
        ("mix", {"methods": []}, "should have at least one$"),
        ("mix", {"methods": ["lorra"]}, "lorra"),
        (
            "mix",
            {"methods": [{"name": "lora", "rnk": 3}]},
            r"^method\.methods\[0\]\.rnk: unknown setting of lora\. Did you mean 'rank'\?$",
        ),
        ("fusion", {}, "two trained adapters"),
        ("fusion", {"adapters": ["one"]}, "two trained adapters"),
        ("fusion", {"adapters": ["one", "two", "one"]}, "one is given more than once"),
        ("fusion", {"adapters": ["runs/a", "./runs/a/adapter"]}, "runs/a and ./runs/a/adapter is given more than once"),
        ("parallel", {"scale": 0}, "scale"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, object], says: str) -> None:
    with pytest.raises(VeneerError, match=says):
        method_class(name)(**settings)


def test_fusion_refuses_what_is_no_adapter_of_outputs(tmp_path: Path) -> None:
    base, folders = trained(tmp_path, 1)
    with pytest.raises(veneer.errors.AdapterFileError, match="nowhere"):
        base.attach(method_class("fusion")(adapters=[*folders, str(tmp_path / "nowhere")]), "both")
    base.attach(method_class("prefix")(), "prefix")
    with pytest.raises(TargetError, match="residual branches"):
        base.attach(method_class("fusion")(adapters=[*folders, "prefix"]), "both")
    assert set(base.adapters) == {"prefix"}
