"""Factored bases: what is written is what was computed, loads again, and takes every method."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import veneer
from helpers import command, perturb, tiny_bert, tiny_llama
from veneer.bases.factored import FactoredLinear, install, ranks_of
from veneer.deltas import LowRank
from veneer.errors import AdapterError, BaseError, ConfigError, OutputError, TargetError

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from contracts import CONTRACTS, method, trained
from families import FAMILIES, run

IDS = torch.arange(14).view(2, 7) + 3


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def factored(family: str, rank: int = 5) -> torch.nn.Module:
    """The family's model in float64, every linear map inside its layers of this rank, exactly."""
    model = FAMILIES[family].model().requires_grad_(False)
    for site in veneer.Base(model).sites.resolve("all-linear"):
        old = model.get_submodule(site.path)
        install(model, {site.path: rank})
        new = model.get_submodule(site.path)
        u, s, v = torch.linalg.svd(old.weight, full_matrices=False)
        new.U.copy_(u[:, :rank] * s[:rank])
        new.V.copy_(v[:rank])
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_written_and_loaded_it_computes_the_best_approximation(make: Any, tmp_path: Path) -> None:
    model = make().double()
    base = veneer.Base(model)
    plain = logits(model)
    report = veneer.factorize(base, tmp_path / "out", keep=0.6)
    assert torch.equal(logits(model), plain)  # the one given stays as it is
    expected = copy.deepcopy(model)
    for each in report.maps:
        weight = expected.get_submodule(each.path).weight.data
        u, s, v = torch.linalg.svd(weight)
        size = (u.shape[0], v.shape[0])
        assert each.rank == int(0.6 * size[0] * size[1] / sum(size))
        assert each.parameters == (weight.numel(), each.rank * sum(size))
        assert each.error == pytest.approx(float(s[each.rank :].norm() / s.norm()), abs=1e-9)
        weight.copy_((u[:, : each.rank] * s[: each.rank]) @ v[: each.rank])
    again = veneer.load_base(tmp_path / "out", dtype=torch.float64)
    assert type(again.model) is type(model)
    assert off(logits(again.model), logits(expected)) < 1e-9
    assert off(logits(again.model), plain) > 1e-3
    assert report.parameters == (base.parameter_count, again.parameter_count)
    assert report.nbytes == (base.nbytes, again.nbytes)
    assert report.parameters[1] < 0.9 * report.parameters[0]
    assert again.missing == frozenset()
    told = json.loads((tmp_path / "out" / "factorization.json").read_text())
    assert [each["rank"] for each in told["maps"]] == [each.rank for each in report.maps]
    assert veneer.load_base(tmp_path / "out", weights=False).parameter_count == report.parameters[1]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt2", "plain", "xlnet")])
def test_every_family_is_written_and_read(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].model().float()
    report = veneer.factorize(veneer.Base(model), tmp_path / "out", keep=0.7)
    auto = {"clip": "AutoModel", "yolos": "AutoModelForObjectDetection", "whisper": "AutoModelForSpeechSeq2Seq",
            "vit": "AutoModelForImageClassification", "wav2vec2": "AutoModelForAudioClassification"}.get(family)  # fmt: skip
    from veneer.bases import load_pretrained

    again = load_pretrained(tmp_path / "out", auto_class=auto).model
    expected = copy.deepcopy(model)
    kept = {each.path: each.rank for each in report.maps if each.rank is not None}
    assert {
        path: module.U.shape[1] for path, module in again.named_modules() if isinstance(module, FactoredLinear)
    } == kept
    for path in kept:
        expected.get_submodule(path).weight.data = again.get_submodule(path).weight.detach()
    with torch.no_grad():
        assert off(run(again, FAMILIES[family].inputs), run(expected, FAMILIES[family].inputs)) < 1e-4
        assert off(run(again, FAMILIES[family].inputs), run(model, FAMILIES[family].inputs)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", sorted(set(CONTRACTS) - {"full"}))  # which trains the factors themselves
def test_every_method_acts_on_whole_maps(name: str, family: str, tmp_path: Path) -> None:
    """As on the same base with dense maps of the same product; and merged into dense ones."""
    model, inputs = factored(family), FAMILIES[family].inputs
    dense = FAMILIES[family].model().requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            dense.get_submodule(path).weight.copy_(module.weight)
    adapters = [veneer.Base(each).attach(method(name), "a").double() for each in (model, dense)]
    for adapter in adapters:
        trained(adapter, name)
    with torch.no_grad():
        plain = run(model, inputs)
        got, expected = (run(adapter, inputs) for adapter in adapters)
        assert off(got, expected) < 1e-9
        assert off(got, plain) > 1e-3
        if CONTRACTS[name].merges:
            try:
                merged = adapters[0].merged()
            except AdapterError as error:
                assert "has none" in str(error)
                return
            assert off(run(merged, inputs), got) < 1e-9
        assert torch.equal(run(model, inputs), plain)
        with adapters[0].base.rows(["a", None]):
            assert off(run(model, inputs)[1], plain[1]) < 1e-9


def test_merged_models_keep_what_is_still_factored(folder: Path, tiny_folder: Path) -> None:
    veneer.factorize(str(tiny_folder), "thin", rank=8)
    base = veneer.load_base("thin", dtype=torch.float32)
    adapter = base.attach(veneer.LoRA(rank=2, targets="q"), "a")
    perturb(adapter)
    adapter.task = {"name": "causal-lm"}
    adapter.save("a")
    assert command("merge", "a", "merged") == 0
    merged = veneer.load_base("merged", dtype=torch.float32)
    assert {path.rpartition(".")[2] for path in ranks_of(merged.backbone)} == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert off(logits(merged.model), logits(adapter)) < 1e-4
    assert off(logits(merged.model), logits(base.model)) > 1e-3
    whole = base.attach(veneer.LoRA(rank=2), "b")
    perturb(whole, std=0.03)
    whole.task = {"name": "causal-lm"}
    whole.save("b")
    assert command("merge", "b", "dense") == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained("dense")
    assert off(logits(plain), logits(whole)) < 1e-4
    assert not ranks_of(veneer.load_base("dense").backbone)


def test_adapters_know_their_base(folder: Path, tiny_folder: Path) -> None:
    veneer.factorize(str(tiny_folder), "thin", rank=8)
    adapter = veneer.load_base("thin").attach(veneer.LoRA(rank=2, targets="q"), "a")
    perturb(adapter)
    adapter.save("a")
    assert veneer.load_adapter("a").base.name == "thin"
    with pytest.raises(BaseError, match="made for the base 'thin'"):
        veneer.load_base(str(tiny_folder)).load("a")
    assert isinstance(next(iter(adapter.lower().values())), LowRank)


def test_other_programs_do_not_take_random_weights_for_the_base(tmp_path: Path) -> None:
    veneer.factorize(veneer.Base(tiny_llama()), tmp_path / "out", rank=4)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_maps_that_would_not_get_smaller_are_left_whole(tmp_path: Path) -> None:
    """Grouped keys and values of 16 · 32 get smaller below rank 10.7, the square ones below 16."""
    report = veneer.factorize(veneer.Base(tiny_llama()), tmp_path / "out", rank=12)
    whole = {each.path.rpartition(".")[2] for each in report.maps if each.rank is None}
    assert whole == {"k_proj", "v_proj"}
    assert veneer.load_base(tmp_path / "out").sites.resolve("k")


def test_what_is_factored_already(tmp_path: Path) -> None:
    veneer.factorize(veneer.Base(tiny_llama()), tmp_path / "half", keep=0.5)
    with pytest.raises(ConfigError, match=r"smaller with keep 0\.5: .* factored already, .* Take a smaller share"):
        veneer.factorize(tmp_path / "half", tmp_path / "out", keep=0.5)
    with pytest.raises(BaseError, match="cannot be quantised: its linear maps are factored"):
        veneer.load_base(tmp_path / "half", quantize="int8")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = veneer.Base(tiny_llama())
    for settings, message in (
        ({}, "either rank .* or keep"),
        ({"rank": 4, "keep": 0.5}, "either rank .* or keep"),
        ({"rank": 0}, "rank is at least 1"),
        ({"keep": 1.0}, "between 0 and 1, not 1"),
        ({"keep": float("nan")}, "between 0 and 1, not nan"),
        ({"rank": 32}, "No map would get smaller with rank 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            veneer.factorize(base, tmp_path / "out", **settings)
    with pytest.raises(TargetError, match="Did you mean 'q_proj'"):
        veneer.factorize(base, tmp_path / "out", rank=4, targets="qproj")
    with pytest.raises(ConfigError, match="only such are factored"):
        veneer.factorize(veneer.Base(FAMILIES["gpt2"].model()), tmp_path / "out", rank=4)
    with pytest.raises(BaseError, match="no model of transformers"):
        veneer.factorize(veneer.Base(FAMILIES["plain"].model()), tmp_path / "out", rank=4)
    base.attach(veneer.LoRA(rank=2), "a")
    with pytest.raises(BaseError, match="carries adapters"):
        veneer.factorize(base, tmp_path / "out", rank=4)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        veneer.factorize(base, tmp_path / "there", rank=4)
    assert command("factorize", tmp_path / "nothing", tmp_path / "out", "--rank", 4) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert command("factorize", "minilm-l6", tmp_path / "out") == 2
    assert "either rank" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("veneer.bases.factorize.write_json", full)
    with pytest.raises(OutputError, match="No space left"):
        veneer.factorize(veneer.Base(tiny_llama()), tmp_path / "out", rank=4)
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_sizes_and_errors(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("factorize", tiny_folder, "out", "--rank", 12, "--targets", "attention") == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "4 factored, 4 left whole" in shown
    assert command("factorize", tiny_folder, "again", "--keep", 0.5, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == "again"
    assert len(told["maps"]) == 14
    assert told["parameters"][1] < told["parameters"][0]
