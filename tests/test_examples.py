"""Every example runs, as its README says: from the project's root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def root(folder: Path) -> Path:
    shutil.copytree(EXAMPLES, folder / "examples")
    return folder


def test_all_examples_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh", ".yaml"})


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_script(root: Path, name: str) -> None:
    done = subprocess.run([sys.executable, f"examples/{name}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_config(root: Path, name: str) -> None:
    command = [sys.executable, "-m", "veneer", "train", f"examples/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = (root / "runs").iterdir()
    assert (run / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.sh")))
def test_commands(root: Path, name: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", f"examples/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    if name == "check_data.sh":
        assert "none cut" in done.stdout
        assert json.loads((root / "report.json").read_text())["ok"]
