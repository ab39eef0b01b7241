"""A local task of lm-evaluation-harness, through an adapted base and the plain one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import veneer
from helpers import perturb, write_jsonl
from veneer.errors import ConfigError
from veneer.evaluation.harness import harness
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.sequence_classification import SequenceClassification

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Greece": "Athens",
}


@pytest.fixture
def task_folder(folder: Path) -> Path:
    """A task file with its data beside it."""
    names = list(CAPITALS.values())
    rows = [
        {"country": country, "choices": [city, *[other for other in names if other != city][:3]]}
        for country, city in CAPITALS.items()
    ]
    data = write_jsonl(folder / "capitals.jsonl", rows)  # type: ignore[arg-type]
    (folder / "tasks").mkdir()
    text = (Path(__file__).parent / "harness" / "capitals.yaml").read_text()
    (folder / "tasks" / "capitals.yaml").write_text(text.replace("capitals.jsonl", str(data)))
    return folder / "tasks"


@pytest.mark.filterwarnings("default")  # those of the harness's dependencies are not ours to mend
def test_a_local_task(smollm: veneer.Base, task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    adapter = smollm.attach(veneer.LoRA(rank=2), "a", task=CausalLM(max_new_tokens=4).describe())
    (same,) = harness(adapter, ["capitals"], folder=task_folder)
    assert (same.task, same.metric) == ("capitals", "acc")
    assert same.base == same.adapter
    assert same.base.value > 0.8  # it knows its capitals
    assert same.base.low is not None
    perturb(adapter, std=0.5)
    (spoilt,) = harness(adapter, ["capitals"], folder=task_folder)
    assert spoilt.base == same.base
    assert spoilt.adapter.value < same.base.value
    with pytest.raises(ConfigError, match=r"no task 'capitols'. Did you mean 'capitals'"):
        harness(adapter, ["capitols"], folder=task_folder)
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        harness(adapter, ["capitals"], folder="nowhere")


def test_classifiers_are_refused(minilm: veneer.Base) -> None:
    pytest.importorskip("lm_eval")
    task = SequenceClassification(labels=("a", "b"), max_length=32)
    adapter = minilm.attach(veneer.LoRA(rank=2), "a", modules=task.head(minilm, seed=0), task=task.describe())
    with pytest.raises(ConfigError, match="runs language models"):
        harness(adapter, ["capitals"])


def test_without_the_harness(smollm: veneer.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    adapter = smollm.attach(veneer.LoRA(rank=2), "a", task=CausalLM(max_new_tokens=4).describe())
    with pytest.raises(ConfigError, match=r"pip install 'veneer\[lm-eval\]'"):
        harness(adapter, ["capitals"])
