"""Shared bases. Real ones are loaded once a session; tests that attach to them detach again."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # other processes have the other cores
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import veneer
from helpers import tiny_llama


@pytest.fixture(scope="session")
def _smollm() -> veneer.Base:
    return veneer.load_base("smollm2-135m-instruct")


@pytest.fixture
def smollm(_smollm: veneer.Base) -> Iterator[veneer.Base]:
    """SmolLM2-135M-Instruct, plain again after the test."""
    yield _smollm
    for name in list(_smollm.adapters):
        _smollm.detach(name)
    _smollm.model.eval()


@pytest.fixture(scope="session")
def _minilm() -> veneer.Base:
    return veneer.load_base("minilm-l6", task="sequence-classification")


@pytest.fixture
def minilm(_minilm: veneer.Base) -> Iterator[veneer.Base]:
    """MiniLM-L6 with a classification head, plain again after the test."""
    yield _minilm
    for name in list(_minilm.adapters):
        _minilm.detach(name)
    _minilm.model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, _smollm: veneer.Base) -> Path:
    """A model folder: a tiny random Llama with SmolLM2's tokenizer and chat template."""
    path = tmp_path_factory.mktemp("bases") / "tiny-llama"
    tiny_llama(vocab_size=49152, initializer_range=0.1).save_pretrained(path)
    _smollm.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def cli() -> Callable[..., int]:
    """The command line in process: takes its arguments, gives its exit code."""
    from veneer.cli.__main__ import main

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0)

    return run
