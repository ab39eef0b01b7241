"""Adapter folders: exact, atomic, checked when read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from helpers import perturb, tiny_bert, tiny_llama
from veneer.adapters.card import CARD
from veneer.adapters.files import CONFIG, RECORD, WEIGHTS
from veneer.adapters.integrity import read_weights
from veneer.errors import AdapterError, AdapterFileError, BaseMismatch, OutputError

IDS = torch.arange(2 * 9).view(2, 9) + 3
HEAD = {"classifier": {"weight": torch.randn(5, 32), "bias": torch.randn(5)}}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    adapter = veneer.Base(tiny_bert(), name="tiny").attach(
        veneer.LoRA(rank=3, alpha=7), modules=HEAD, task={"name": "sequence-classification", "labels": list("abcde")}
    )
    perturb(adapter)
    adapter.save(tmp_path / "saved")
    return tmp_path / "saved", logits(adapter)


def test_save_and_load_are_bit_exact(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    assert sorted(file.name for file in folder.iterdir()) == sorted([CONFIG, WEIGHTS, RECORD, CARD])
    base = veneer.Base(tiny_bert(), name="tiny")
    adapter = base.load(folder)
    assert adapter.name == "saved"
    assert torch.equal(logits(adapter), expected)
    assert adapter.method == veneer.LoRA(rank=3, alpha=7)
    assert adapter.task["labels"] == list("abcde")
    assert (expected - logits(base.load(folder, "again"))).abs().max() == 0


def test_saving_again_replaces_and_a_failure_keeps_the_old(
    saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved
    base = veneer.Base(tiny_bert(), name="tiny")
    adapter = base.load(folder)
    perturb(adapter, seed=9)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("veneer.adapters.files.save_file", no_space)
        with pytest.raises(OutputError, match="No space left"):
            adapter.save(folder)
    assert torch.equal(logits(base.load(folder, "old")), expected)
    adapter.save(folder)
    assert torch.equal(logits(base.load(folder, "new")), logits(adapter))
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_another_base_is_refused(saved: tuple[Path, torch.Tensor]) -> None:
    other = tiny_bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    base = veneer.Base(other, name="other")
    with pytest.raises(BaseMismatch, match="made for the base 'tiny'"):
        base.load(saved[0])
    assert not base.adapters


def _flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def _no_hash(folder: Path, change: object) -> None:
    """Change the tensors of a folder without a record of their hash."""
    (folder / RECORD).unlink()
    state = load_file(folder / WEIGHTS)
    change(state)  # type: ignore[operator]
    save_file(state, folder / WEIGHTS)


KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_flip, "is damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK"), "is damaged"),
        (lambda f: (f / WEIGHTS).unlink(), "Pickled weights"),
        (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
        (lambda f: (f / CONFIG).unlink(), "no adapter folder"),
        (lambda f: (f / RECORD).write_text("[]"), "no JSON object"),
        (lambda f: _no_hash(f, lambda s: s.pop(KEY)), "misses"),
        (lambda f: _no_hash(f, lambda s: s.update(extra=torch.ones(1))), "extra, which has no place"),
        (lambda f: _no_hash(f, lambda s: s.update({KEY: torch.ones(4, 32)})), r"as \[4, 32\], not \[3, 32\]"),
    ],
)
def test_spoilt_folders_are_refused_and_leave_the_base_plain(
    saved: tuple[Path, torch.Tensor], spoil: object, message: str
) -> None:
    folder, _ = saved
    spoil(folder)  # type: ignore[operator]
    base = veneer.Base(tiny_bert(), name="tiny")
    with pytest.raises(AdapterFileError, match=message):
        base.load(folder)
    assert not base.adapters
    assert not hasattr(base.model, "veneer_adapters")


def test_nothing_foreign_is_overwritten(tmp_path: Path) -> None:
    adapter = veneer.Base(tiny_llama()).attach(veneer.LoRA(rank=2))
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(AdapterError, match="no adapter folder"):
        adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(OutputError, match="is a file"):
        adapter.save(tmp_path / "precious.txt")


def test_the_record_says_what_peft_has_no_place_for(saved: tuple[Path, torch.Tensor]) -> None:
    record = json.loads((saved[0] / RECORD).read_text())
    assert record["base"]["name"] == "tiny"
    assert len(record["base"]["fingerprint"]) == 64
    assert record["method"] == {"name": "lora", **veneer.LoRA(rank=3, alpha=7).model_dump(mode="json")}
    assert set(record["versions"]) == {"veneer", "torch", "transformers", "python"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two renames")
def test_there_is_no_moment_without_an_adapter(
    saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved
    adapter = veneer.Base(tiny_bert(), name="tiny").load(folder)
    perturb(adapter, seed=9)

    def killed(*_: object) -> None:
        raise AssertionError("between two renames the folder is gone")

    monkeypatch.setattr("veneer.storage.os.rename", killed)
    adapter.save(folder)
    assert torch.equal(logits(veneer.Base(tiny_bert(), name="tiny").load(folder)), logits(adapter))
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path: Path) -> None:
    """640 is 0x280: its bytes are those that a pickle of protocol 2 begins with."""
    for padding in range(0, 2000, 8):
        save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors", metadata={"pad": "." * padding})
        header = (tmp_path / "weights.safetensors").read_bytes()[:2]
        if header == b"\x80\x02":
            break
    else:
        pytest.fail("no header was 640 bytes long")
    assert torch.equal(read_weights(tmp_path / "weights.safetensors", None)["x"], torch.ones(2))
