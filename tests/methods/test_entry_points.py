"""A package of somebody else's registers methods by entry point; a broken one is told, and harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = '''
from typing import ClassVar
import torch
from veneer.deltas import Bias
from veneer.methods.targeted import Targeted

class Shift(Targeted):
    """Adds a vector."""
    name: ClassVar[str] = "shift"
    summary: ClassVar[str] = "adds a vector to the outputs of linear maps"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "ACME_SHIFT"
    start: float = 0.0
    """What it starts from."""
    def parameters(self, site, generator, base):
        return {"shift": torch.full((site.out_features,), self.start)}
    def lower(self, site, parameters, step):
        return Bias(parameters["shift"])

class Lora(Shift):
    name: ClassVar[str] = "lora"
'''


def install(site: Path, package: str, source: str, points: dict[str, str]) -> None:
    """What pip leaves of a package with one module."""
    (site / f"{package}.py").write_text(source)
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[veneer.methods]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "acme", GOOD, {"shift": "acme:Shift", "lora": "acme:Lora", "shifty": "acme:Shift"})
    install(folder, "brokn", "import nothing_of_that_name", {"brokn": "brokn:Brokn"})
    install(folder, "other", "Other = dict", {"other": "other:Other", "absent": "other:Absent"})
    return folder


def veneer_command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, "-m", "veneer", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


def test_methods_of_other_packages(site: Path) -> None:
    found = veneer_command(site, "methods", "shift", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["peft_type"] == "ACME_SHIFT"
    assert "start" in json.loads(found.stdout)["settings"]
    warnings = [line for line in found.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 5
    for told in (
        "package brokn 1.2 offers the method 'brokn' (brokn:Brokn), which can't be used: ModuleNotFoundError",
        "package acme 1.2 offers the method 'lora' (acme:Lora), which can't be used: veneer has a method of that name",
        "'shifty' (acme:Shift), which can't be used: it is no subclass of veneer.Method whose name is 'shifty'",
        "'other' (other:Other), which can't be used: it is no subclass",
        "'absent' (other:Absent), which can't be used: AttributeError",
    ):
        assert any(told in line for line in warnings), (told, warnings)


def test_a_broken_one_that_is_asked_for(site: Path) -> None:
    asked = veneer_command(site, "methods", "brokn")
    assert asked.returncode == 2
    assert "No method called 'brokn': package brokn 1.2" in asked.stderr
    assert "Traceback" not in asked.stderr
    own = veneer_command(site, "methods", "lora", "--json")
    assert json.loads(own.stdout)["peft_type"] == "LORA"


def test_a_method_of_another_package_in_a_config(site: Path, tmp_path: Path) -> None:
    code = "from veneer.methods import method_from_config as m; print(repr(m({'name': 'shift', 'start': 2})))"
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert "start=2.0" in done.stdout, done.stderr
