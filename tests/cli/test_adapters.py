"""``veneer adapters verify``, and loading what it would refuse."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from helpers import command, perturb
from veneer.tasks.sequence_classification import SequenceClassification

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "good"
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(
        veneer.LoRA(rank=2), task={"name": "causal-lm", "peft_task_type": "CAUSAL_LM"}
    )
    perturb(adapter)
    adapter.save(path)
    return path


@pytest.fixture
def copy(good: Path, folder: Path) -> Path:
    shutil.copytree(good, folder / "copy")
    return Path("copy")


def states(out: str) -> dict[str, str]:
    return {check["what"]: check["state"] for check in json.loads(out)["checks"]}


def test_an_intact_adapter(copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("adapters", "verify", copy) == 0
    assert "copy is intact" in capsys.readouterr().out
    assert command("adapters", "verify", copy, "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out)["intact"] is True
    assert states(out) == dict.fromkeys(("links", "config", "record", "weights", "hashes"), "ok") | {
        "base": "unchecked"
    }
    assert command("adapters", "verify", copy, "--base", tiny_folder, "--json") == 0
    assert set(states(capsys.readouterr().out).values()) == {"ok"}
    assert command("adapters", "verify", "nowhere") == 2
    assert "no adapter folder" in capsys.readouterr().err
    (copy / "README.md").write_text("mine")
    assert command("adapters", "verify", copy) == 0
    assert "README.md was edited, as it may be" in capsys.readouterr().out
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    assert command("adapters", "verify", copy, "--json") == 1
    assert states(capsys.readouterr().out)["hashes"] == "error"


def flip(path: Path) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-3] ^= 4
    (path / WEIGHTS).write_bytes(content)


def cut(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:-100])


def header(length: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])

    return change


def pickled(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "weights")
    os.replace(path / "weights", path / WEIGHTS)


def only_a_pickle(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


def linked(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        shutil.move(path / name, path.parent / f"outside-{name}")
        (path / name).symlink_to(Path("..") / f"outside-{name}")

    return change


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors, with a record that agrees."""

    def apply(path: Path) -> None:
        from veneer.storage import sha256

        state = load_file(path / WEIGHTS)
        change(state)
        save_file(state, path / WEIGHTS)
        made = json.loads((path / "veneer.json").read_text())
        made["sha256"][WEIGHTS] = sha256(path / WEIGHTS)
        (path / "veneer.json").write_text(json.dumps(made))

    return apply


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (flip, "is damaged: it is not the file veneer.json describes"),
    (cut, "is damaged: cut short"),
    (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"more"), "is damaged: too long"),
    (lambda p: (p / WEIGHTS).write_bytes(b""), "no safetensors file: it has 0 bytes"),
    (header(2**62), "claims a header of 4,611,686,018,427,387,904 bytes"),
    (header(40), "its header is broken"),
    (pickled, "it is a pickle, which is never read"),
    (only_a_pickle, "There is adapter_model.bin. Pickled weights (.bin) are never read"),
    (linked(WEIGHTS), "outside of its folder, and is not followed"),
    (linked("adapter_config.json"), "outside of its folder, and is not followed"),
    (linked("veneer.json"), "outside of its folder, and is not followed"),
    (lambda p: (p / "veneer.json").write_text("["), "veneer.json cannot be read"),
    (lambda p: (p / "veneer.json").write_text('{"sha256": [1]}'), "veneer.json is broken: sha256 is [1]"),
    (lambda p: (p / "veneer.json").write_text('{"training": {"config": 3}}'), "veneer.json is broken: training.config"),
    (lambda p: (p / "adapter_config.json").write_text('{"modules_to_save": 1}'), "is broken: modules_to_save is 1"),
    (lambda p: (p / "adapter_config.json").write_text("[]"), "adapter_config.json is no JSON object"),
    (changed(lambda s: s[KEY].fill_(float("nan"))), "values in " + KEY + " that are no numbers"),
    (changed(lambda s: s[KEY].fill_(float("inf"))), "values in " + KEY + " that are no numbers"),
    (changed(lambda s: s.update({KEY: s[KEY].to(torch.complex64)})), "as torch.complex64, which no adapter"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_what_is_wrong_is_told_and_never_loaded(
    copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copy)
    assert command("adapters", "verify", copy) == 1
    out, err = capsys.readouterr()
    assert message in " ".join(out.split())
    assert "copy is not intact" in out
    assert "Traceback" not in err
    assert command("generate", "hello", "--adapter", copy, "--base", tiny_folder, "--max-new-tokens", 1) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(lambda s: s.update({KEY: s[KEY][:1].clone()})), "as [1, 32], not [2, 32]"),
        (changed(lambda s: s.update({KEY: s[KEY].to(torch.int32)})), "as torch.int32, not torch.float32"),
        (changed(lambda s: s.pop(KEY)), "misses " + KEY),
    ],
)
def test_what_only_the_base_can_tell(
    copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copy)
    made = json.loads((copy / "veneer.json").read_text())
    made.pop("numbers")
    (copy / "veneer.json").write_text(json.dumps(made))
    assert command("adapters", "verify", copy) == 0
    assert command("adapters", "verify", copy, "--base", tiny_folder) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_another_base(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("adapters", "verify", copy, "--base", "smollm2-135m-instruct") == 1
    assert "was made for the base" in capsys.readouterr().out


def test_an_adapter_that_changes_nothing(copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(lambda state: [tensor.zero_() for name, tensor in state.items() if "lora_B" in name])(copy)
    assert command("adapters", "verify", copy, "--base", tiny_folder, "--json") == 0
    assert states(capsys.readouterr().out)["effect"] == "warning"
    with pytest.warns(veneer.errors.VeneerWarning, match="It was saved before it was trained, or what it trains"):
        assert command("generate", "hello", "--adapter", copy, "--max-new-tokens", 1) == 0


def test_what_the_hub_caches_is_no_link_outside(copy: Path, tiny_folder: Path) -> None:
    blobs, snapshot = Path("models--x/blobs"), Path("models--x/snapshots/0123")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert command("adapters", "verify", snapshot) == 0


def test_a_head_alone_is_an_adapter(minilm: veneer.Base, folder: Path) -> None:
    task = SequenceClassification(labels=("a", "b"))
    adapter = minilm.attach(veneer.HeadOnly(), "h", modules=task.head(minilm, seed=0), task=task.describe())
    adapter.save("head")
    assert minilm.load("head", "again").trainable == adapter.trainable  # without a warning, which would be an error


def test_a_broken_task_is_told(copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads((copy / "veneer.json").read_text())
    made["task"]["max_length"] = "long"
    (copy / "veneer.json").write_text(json.dumps(made))
    assert command("generate", "x", "--adapter", copy) == 2
    assert "task.max_length: Input should be a valid integer" in capsys.readouterr().err
