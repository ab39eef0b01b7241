"""Methods of every kind beside a task's head: cut off and resumed to the same bits, kept, loaded, verified."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_during import at_step, outcome_of  # noqa: F401

from helpers import command, write_jsonl
from veneer.adapters.verify import verify

ROWS = [
    {"text": f"{'Open' if n % 2 else 'Close'} door number {n}.", "label": n % 2, "task": "ab"[n % 3 == 0]}
    for n in range(32)
]
METHODS = {
    "lora": "{name: lora, rank: 2}",
    "tokens": "{name: tokens, tokens: [open, close]}",
    "fusion": "{name: fusion, adapters: [first/adapter, second/adapter]}",
    "conditional": "{name: conditional, bottleneck: 4}",
    "vblora": "vblora",
}


@pytest.fixture
def line(folder: Path) -> Callable[[str, str], list[str]]:
    write_jsonl(folder / "rows.jsonl", ROWS)

    def of(method: str, output: str) -> list[str]:
        settings = {
            "base": "minilm-l6",
            "data.train": "rows.jsonl",
            "data.validation": 0.25,
            "output": output,
            "method": method,
            "train.learning_rate": 1e-2,
            "train.epochs": 2,
            "train.evaluate_every": 2,
        }
        return ["train", *(f"{key}={value}" for key, value in settings.items())]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_a_head(
    name: str,
    line: Callable[[str, str], list[str]],
    at_step: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "fusion":
        assert command(*line("{name: pfeiffer, bottleneck: 4}", "first")) == 0
        shutil.copytree("first", "second")
    assert command(*line(METHODS[name], "whole")) == 0
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command(*line(METHODS[name], "cut")) == 130
    assert command(*line(METHODS[name], "cut")) == 0
    assert outcome_of("cut") == outcome_of("whole")

    head = {k: v for k, v in load_file("whole/adapter/adapter_model.safetensors").items() if "classifier" in k}
    assert set(head) == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert head["base_model.model.classifier.bias"].abs().max() > 0  # it has learned
    assert [check.what for check in verify(Path("whole")) if check.state == "error"] == []
    capsys.readouterr()
    assert command("eval", "whole", "rows.jsonl", "--no-base", "--json") == 0
    first = json.loads(capsys.readouterr().out)["adapter"]
    assert command("eval", "whole", "rows.jsonl", "--no-base", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == first


def test_a_head_that_a_file_lacks(line: Callable[[str, str], list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    assert command(*line(METHODS["lora"], "run")) == 0
    file = Path("run/adapter/adapter_model.safetensors")
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file)
    record = Path("run/adapter/veneer.json")
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "sha256"}))
    capsys.readouterr()
    assert command("eval", "run", "rows.jsonl") == 2
    assert "lacks classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: mix, methods: [full, lora]}", "nothing can stand beside it"),
        ("{name: mix, methods: [{name: fusion, adapters: [a, b]}, lora]}", "can't be a part of a mix"),
        ("{name: conditional, tasks: [a, c]}", "rows are of task b, but it has a, c"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    method: str, says: str, line: Callable[[str, str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*line(method, "run")) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


def test_a_conditional_adapter_wants_to_know_the_tasks(
    line: Callable[[str, str], list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(folder / "rows.jsonl", [{"text": row["text"], "label": row["label"]} for row in ROWS])
    assert command(*line("conditional", "run")) == 2
    assert "no `task` column" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["-4:", "1:5", ":2", "-1:"])
def test_slices_in_a_shell(layers: str) -> None:
    """YAML would make a mapping of -4: and sixty-five of 1:5."""
    from veneer.training.config import read_config

    given = ["base=minilm-l6", "data.train=x", "output=y", "method.name=lora", f"method.layers={layers}"]
    assert read_config(None, given).method.layers == layers


def test_a_merged_classifier_names_its_labels(
    line: Callable[[str, str], list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself, in transformers: three labels over a base with two."""
    import transformers

    write_jsonl(folder / "rows.jsonl", [{**row, "label": "xyz"[n % 3]} for n, row in enumerate(ROWS)])
    assert command(*line(METHODS["lora"], "run")) == 0
    assert command("merge", "run", "merged") == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    text = str(ROWS[0]["text"])
    shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
    capsys.readouterr()
    assert command("predict", "run", "rows.jsonl", "--output", "answers.jsonl") == 0
    answer = json.loads(Path("answers.jsonl").read_text().splitlines()[0])
    named = {model.config.id2label[index]: share for index, share in enumerate(shares)}
    assert named == pytest.approx(answer["probabilities"], abs=1e-4)
