"""Training what is kept without its network, under file names of its own, in positions the text must leave it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import veneer
from helpers import write_jsonl
from veneer.adapters.verify import verify
from veneer.errors import ConfigError, DataError
from veneer.methods import Method, method_class
from veneer.tasks.sequence_classification import SequenceClassification
from veneer.training import RunConfig, run

ROWS = [{"text": f"{'Open' if n % 2 else 'Close'} door number {n}.", "label": n % 2} for n in range(24)]
METHODS = {
    "prompt": method_class("prompt")(length=4, init="class-labels"),
    "prefix": method_class("prefix")(length=4, mlp=True, mlp_width=16),
    "ptuning": method_class("ptuning")(length=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_keeps_its_best_without_the_network(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    config = RunConfig.parse(
        {
            "base": "minilm-l6",
            "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "validation": 0.25},
            "method": {"name": name, **method.model_dump()},
            "train": {"epochs": 1, "batch_size": 8, "samples": 0},
            "output": tmp_path / "run",
        }
    )
    adapter, result = run(config)
    network = name != "prompt"
    assert (result.trainable > adapter.trainable) == network
    assert adapter.task["max_length"] == 512 - 4
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / "veneer.json").read_text())["trainable"] == adapter.trainable
    card = (folder / "README.md").read_text()
    assert f"{result.trainable:,} numbers trained" in card
    assert (f"{adapter.trainable:,} kept" in card) == network
    assert all(check.state == "ok" for check in verify(folder) if check.what != "base")
    again = veneer.load_adapter(folder)
    long = again.base.tokenizer(
        ["door " * 600], truncation=True, max_length=again.task["max_length"], return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(again(**long).logits, adapter(**long).logits)


@pytest.mark.parametrize("name", METHODS)
def test_a_length_that_leaves_no_positions_is_refused(name: str) -> None:
    base = veneer.load_base("minilm-l6", task="sequence-classification")
    adapter = base.attach(METHODS[name], task={"labels": [0, 1]})
    task = SequenceClassification(labels=("0", "1"), max_length=509)
    with pytest.raises(ConfigError, match=r"509 tokens and the 4 positions .* the 512 that minilm-l6 has; at most 508"):
        veneer.train(adapter, ROWS, task=task)


def test_no_position_is_left() -> None:
    base = veneer.load_base("minilm-l6", task="sequence-classification")
    method: Method = method_class("prompt")(length=511)
    with pytest.raises(ConfigError, match="at most 1 are left"):
        veneer.train(base.attach(method), ROWS)


def test_rows_without_markers_are_found_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{**row, "text": f"[MASK] {row['text']}" if n != 5 else row["text"]} for n, row in enumerate(ROWS)]
    config = RunConfig.parse(
        {
            "base": "minilm-l6",
            "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "validation": 0},
            "method": {"name": "ptuning", "length": 4, "slots": [3], "marker": "[MASK]"},
            "output": tmp_path / "run",
        }
    )
    with pytest.raises(DataError, match=r"1 of 24 examples have fewer markers \[MASK\] than the 1 slots .* line 6"):
        run(config)
    assert not list(tmp_path.glob("run/*"))
