"""Any adapter as plain LoRA: exact where it is low-rank, else the best of its rank, with the error told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from helpers import perturb, tiny_bert, tiny_llama
from veneer.adapters.convert import converted
from veneer.errors import AdapterError
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.arange(2 * 9).view(2, 9) + 3
EXACT: dict[str, dict[str, Any]] = {
    "vera": {"rank": 5},
    "loha": {"rank": 2, "alpha": 3},
    "adalora": {"rank": 4, "target_rank": 2},
    "lora": {"rank": 4, "alpha": 7, "init": "pissa", "rank_pattern": {"down": 6}},
}


def attached(name: str, model: torch.nn.Module, **settings: Any) -> veneer.Adapter:
    adapter = veneer.Base(model).attach(method_class(name)(**settings), "a")
    perturb(adapter, std=0.2)
    return adapter


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, tmp_path: Path) -> None:
    adapter = attached(name, tiny_llama(), **EXACT[name])
    new, errors = converted(adapter, veneer.LoRA, "b")
    expected = outputs(adapter)
    assert (expected - outputs(adapter.base.model)).abs().max() > 1e-2
    assert torch.allclose(outputs(new), expected, atol=2e-4)
    assert set(errors.values()) == {0.0}
    new.save(tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")
    assert torch.allclose(outputs(theirs), expected, atol=2e-4)


def test_approximated_as_well_as_the_rank_allows() -> None:
    adapter = attached("lokr", tiny_llama(), rank=4, alpha=4)
    errors = []
    for rank in (1, 4, 16):
        new, of = converted(adapter, veneer.LoRA, f"r{rank}", rank)
        found = (outputs(new) - outputs(adapter)).norm() / outputs(adapter).norm()
        errors.append((max(of.values()), float(found)))
    assert errors[0][0] > errors[1][0] > errors[2][0]
    assert errors[0][1] > errors[2][1]
    site = adapter.sites[0]
    delta = adapter.lower(training=False)[site.path]
    change = delta.changed({"weight": torch.zeros(site.out_features, site.in_features)})["weight"]
    singular = torch.linalg.svdvals(change.detach())
    _, of = converted(adapter, veneer.LoRA, "again", 4)
    assert of[site.path] == pytest.approx(float(singular[4:].norm() / singular.norm()), rel=1e-3)


def test_a_head_comes_along(tmp_path: Path) -> None:
    base = veneer.Base(tiny_bert())
    head = {"classifier": {"weight": torch.randn(5, 32), "bias": torch.randn(5)}}
    adapter = base.attach(method_class("vera")(rank=3), "a", modules=head)
    perturb(adapter)
    new, _ = converted(adapter, veneer.LoRA, "b")
    assert outputs(new).shape == (2, 5)
    expected = outputs(adapter)
    assert torch.allclose(outputs(new), expected, atol=1e-5)
    perturb(adapter, seed=5)  # what becomes of the one is nothing to the other
    assert torch.allclose(outputs(new), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "rank", "message"),
    [
        ("lokr", {"rank": 2}, None, "q_proj can't be written as lora: .*give a rank"),
        ("prefix", {"length": 2}, 4, "prefix acts at model.layers.0.self_attn, which is no map"),
        ("houlsby", {"bottleneck": 2}, 4, "cannot be merged"),
        ("bitfit", {}, 4, "A bias cannot be merged"),
    ],
)
def test_what_cannot_be(name: str, settings: dict[str, Any], rank: int | None, message: str) -> None:
    adapter = attached(name, tiny_llama(), **settings)
    with pytest.raises(AdapterError, match=message):
        converted(adapter, veneer.LoRA, "b", rank)
    assert list(adapter.base.adapters) == ["a"]
    with pytest.raises(AdapterError, match="can't be written as ia3"):
        converted(attached("lora", tiny_llama(), rank=2), method_class("ia3"), "b")


def test_the_command(tiny_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.cli.__main__ import main

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return int(stopped.value.code or 0)

    base = veneer.load_base(tiny_folder, dtype="float32")
    for name, settings in (("vera", {"rank": 3}), ("lokr", {"rank": 2})):
        adapter = base.attach(method_class(name)(**settings), name)
        perturb(adapter)
        adapter.save(folder / name)
    assert run("export", "vera", "out/lora", "--to", "lora") == 0
    assert "exact" in capsys.readouterr().out
    assert json.loads(Path("out/lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert run("export", "lokr", "out/other", "--to", "lora") == 2
    assert "give a rank" in capsys.readouterr().err
    assert not Path("out/other").exists()
    assert run("export", "lokr", "out/other", "--to", "lora", "--rank", 4, "--json") == 0
    assert max(json.loads(capsys.readouterr().out)["errors"].values()) > 0
    assert run("export", "lokr", "out/other", "--to", "lora", "--rank", 4) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("export", "nowhere", "out/new", "--to", "lora") == 2
    assert run("export", "vera", "out/new", "--to", "lorra") == 2
    assert "Did you mean 'lora'" in capsys.readouterr().err
