"""``veneer doctor``: what it finds, what it says to do, and when it fails."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from veneer import doctor
from veneer.adapters import Adapter, files
from veneer.doctor import TESTED, examine


def found(section: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in examine() if check.section == section}


def test_it_reports_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    out, err = capsys.readouterr()
    for told in (
        "memory",
        "torch",
        "cache",
        "offline mode (HF_HUB_OFFLINE is set)",
        "✓ learns",
        "✓ merges",
        "veneer works here",
    ):
        assert told in out, told
    assert err == ""  # the training inside is silent
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["saves and loads"]["found"].startswith("bit for bit the same")
    assert checks["leaves the base alone"]["ok"]
    assert {"CPU", "memory", "GPU", "torch", "peft", "folder", "disk", "hub", "optuna"} <= set(checks)


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pinned = dict(
        re.findall(r"^([\w.-]+)==(.+)$", Path(__file__, "../../../constraints.txt").resolve().read_text(), re.M)
    )
    assert {name: pinned[name] for name in TESTED} == dict(TESTED)


def test_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    odd = {"torch": "2.1.0", "transformers": "9.0.0", "datasets": None}

    def version(name: str) -> str:
        if odd.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return odd.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = {check.name: check for check in doctor._versions()}
    assert checks["torch"].ok is False
    assert checks["torch"].essential
    assert "pip install 'torch>=2.6'" in checks["torch"].advice
    assert checks["transformers"].ok is False
    assert not checks["transformers"].essential
    assert "Newer than what is tested" in checks["transformers"].advice
    assert checks["datasets"].found == "not installed"
    assert checks["accelerate"].ok


def forgets_to_fill(adapter: Adapter, state: object, path: object) -> None:
    """Loading that leaves the new adapter as it is."""


def harms_the_base(adapter: Adapter) -> torch.nn.Module:
    """Merging that also writes to the base."""
    merged = MERGED(adapter)
    adapter.base.model.get_output_embeddings().weight.data.mul_(1.01)
    return merged


MERGED = Adapter.merged


@pytest.mark.filterwarnings("ignore::veneer.errors.VeneerWarning")  # that an adapter so loaded changes nothing
@pytest.mark.parametrize(
    ("owner", "name", "broken", "failing"),
    [
        (torch.optim.AdamW, "step", lambda self, closure=None: None, "learns"),
        (files, "_fill", forgets_to_fill, "saves and loads"),
        (Adapter, "merged", lambda self: self.base.model, "merges"),
        (Adapter, "merged", harms_the_base, "leaves the base alone"),
    ],
)
def test_a_broken_machine_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: object,
    name: str,
    broken: object,
    failing: str,
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert f"✗ {failing}" in out
    assert out.count("✗") == 1
    assert "→ Compare the versions" in out
    assert "veneer does not work here yet." in out


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "veneer.training", None)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "✗ veneer.training" in out
    assert "cannot be imported" in out


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    (check,) = doctor._cache()
    assert check.ok is False
    assert check.essential
    assert "VENEER_CACHE" in check.advice


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (check,) = doctor._hub()
    assert check.ok is False
    assert not check.essential
    assert "HF_ENDPOINT" in check.advice
