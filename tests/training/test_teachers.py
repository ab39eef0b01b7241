"""Who may teach, in real runs: the base itself, an adapter, another base; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import veneer
from helpers import command, perturb, sums, tiny_llama, write_jsonl
from veneer.errors import BaseMismatch, ConfigError
from veneer.tasks.causal_lm import CausalLM
from veneer.training import reproduce
from veneer.training.distillation import distilling
from veneer.training.settings import DistillSettings

MAILS: list[dict[str, object]] = [
    {"text": text, "label": label}
    for n in range(16)
    for text, label in ((f"what a lovely day, number {n}", "glad"), (f"nothing works, {n} times now", "sad"))
]


def test_the_base_as_teacher_holds_the_student_back(tiny_folder: Path) -> None:
    """With λ = 1 nothing but the base counts: the divergence of a student that had left it falls."""
    base = veneer.load_base(tiny_folder, dtype="float32")
    student = base.attach(veneer.LoRA(rank=4), "s")
    perturb(student, std=0.05)
    result = veneer.train(
        student, sums(24), validation=sums(8, 100), distill={"teacher": "base", "weight": 1}, epochs=4,
        learning_rate=3e-3, samples=0, keep_best=False,
    )  # fmt: skip
    assert result.before is not None
    assert result.after is not None
    assert result.before["divergence"] > 0.01
    assert result.after["divergence"] < result.before["divergence"] / 3
    assert student.record["distill"] == {
        "teacher": "base", "weight": 1.0, "temperature": 2.0, "divergence": "forward",
    }  # fmt: skip


@pytest.mark.slow
def test_an_adapter_teaches_a_smaller_one_on_minilm(
    folder: Path, minilm: veneer.Base, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained classifier's opinions, by config: its divergence falls, its labels are told; a changed one is noticed."""
    write_jsonl(folder / "rows.jsonl", MAILS)
    keys = ("base=minilm-l6", "data.train=rows.jsonl", "data.validation=0.25", "train.epochs=3")
    assert command("train", *keys, "train.learning_rate=3e-3", "output=teacher") == 0
    more = (
        "method.rank=4",
        "train.epochs=8",
        "train.learning_rate=3e-3",
        "distill.teacher=teacher",
        "distill.weight=1",
    )
    assert command("train", *keys, *more, "output=run") == 0
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["after"]["divergence"] < report["before"]["divergence"] / 2
    record = json.loads((folder / "run" / "adapter" / "veneer.json").read_text())
    assert record["training"]["config"]["distill"]["teacher"] == "teacher"
    assert record["training"]["teacher"]
    adapter = veneer.load_adapter("run")
    assert set(adapter.base.adapters) == {"run"}
    capsys.readouterr()
    perturb(teacher := veneer.load_adapter("teacher"))
    teacher.save(folder / "teacher" / "adapter")
    with pytest.raises(BaseMismatch, match="The teacher's weights changed since this adapter was trained"):
        reproduce("run", "again")


def test_another_base_may_teach(tiny_folder: Path, tmp_path: Path) -> None:
    """One of the same vocabulary; here one that differs by what a LoRA can learn."""
    base = veneer.load_base(tiny_folder, dtype="float32")
    perturb(other := base.attach(veneer.LoRA(rank=2), "other"), std=0.1)
    other.merged().save_pretrained(tmp_path / "teacher")
    base.tokenizer.save_pretrained(tmp_path / "teacher")
    base.detach("other")
    student = base.attach(veneer.LoRA(rank=4), "s")
    result = veneer.train(
        student, sums(16), validation=sums(8, 100), distill={"teacher": str(tmp_path / "teacher"), "weight": 1},
        epochs=4, learning_rate=1e-2, samples=0, keep_best=False,
    )  # fmt: skip
    assert result.before is not None
    assert result.after is not None
    assert result.after["divergence"] < result.before["divergence"] / 2


def test_an_adapter_over_another_base_may_teach(tiny_folder: Path, tmp_path: Path) -> None:
    base = veneer.load_base(tiny_folder, dtype="float32")
    other = tmp_path / "other"
    tiny_llama(vocab_size=49152, initializer_range=0.1, num_hidden_layers=1).save_pretrained(other)
    base.tokenizer.save_pretrained(other)
    perturb(teacher := veneer.load_base(other).attach(veneer.LoRA(rank=2), "t"))
    teacher.save(tmp_path / "teacher")
    student = base.attach(veneer.LoRA(rank=2), "s")
    task = CausalLM.for_rows(None, base)
    how = DistillSettings(teacher=str(tmp_path / "teacher"))
    with distilling(student, task, how) as found:
        assert found is not None
        assert found.base is not base
        ids = torch.arange(10)[None] + 5
        with torch.no_grad():
            assert torch.equal(found.teacher(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "distill.teacher: is missing"),
        ({"teacher": "base", "weight": 1.5}, "distill.weight: should be less than or equal to 1"),
        ({"teacher": "base", "temperature": 0}, "distill.temperature: should be greater than 0"),
        ({"teacher": "base", "divergence": "backward"}, "'forward', 'reverse' or 'jsd'"),
        ({"teacher": "base", "lambda": 1}, "distill.lambda: unknown key"),
        ({"teacher": "nobody"}, "No base called 'nobody'"),
        ({"teacher": "minilm-l6"}, "is an encoder"),
    ],
)
def test_mistakes_are_told(settings: dict[str, object], message: str, tiny_folder: Path) -> None:
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=2), "a")
    with pytest.raises(ValueError, match=message):
        veneer.train(adapter, sums(8), distill=settings, max_steps=1)
    assert list(adapter.base.adapters) == ["a"]


def test_teachers_that_cannot_teach_this(folder: Path, tiny_folder: Path, minilm: veneer.Base) -> None:
    write_jsonl(folder / "rows.jsonl", MAILS)
    base = veneer.load_base(tiny_folder, dtype="float32")
    student = base.attach(veneer.LoRA(rank=2), "s")
    tiny_llama().save_pretrained(folder / "foreign")
    with pytest.raises(ConfigError, match=r"has another vocabulary \(no tokenizer\) than .* \(49,152 tokens\)"):
        veneer.train(student, sums(8), distill={"teacher": "foreign"})
    classifier = minilm.attach(veneer.LoRA(rank=2), "c")
    with pytest.raises(ConfigError, match=r"the base by itself cannot do sequence-classification"):
        veneer.train(classifier, MAILS, distill={"teacher": "base"})
    with pytest.raises(ConfigError, match=r"minilm-l6 was not trained to tell glad, sad apart"):
        veneer.train(classifier, MAILS, distill={"teacher": "minilm-l6"})
    (folder / "runs").mkdir()  # where there are runs, that would be one
    with pytest.raises(ConfigError, match=r"there is no runs/nope\."):
        veneer.train(student, sums(8), distill={"teacher": "runs/nope"})
    with pytest.raises(ConfigError, match=r"there is no \./nope\."):
        veneer.train(student, sums(8), distill={"teacher": "./nope"})
    with pytest.raises(ConfigError, match=r"no folder someone/nope here, and as a base it cannot be had"):
        veneer.train(student, sums(8), distill={"teacher": "someone/nope"})
    other = minilm.attach(veneer.LoRA(rank=2), "o")
    veneer.train(other, [{**row, "label": f"very {row['label']}"} for row in MAILS], max_steps=1, samples=0)
    other.save("other")
    with pytest.raises(ConfigError, match=r"other tells very glad, very sad apart, not glad, sad"):
        veneer.train(classifier, MAILS, distill={"teacher": "other"})
    with pytest.raises(ConfigError, match=r"there is no \./othr\. Did you mean 'other'"):
        veneer.train(student, sums(8), distill={"teacher": "./othr"})
    with pytest.raises(ConfigError, match=r"other was trained for sequence-classification, not for causal-lm"):
        veneer.train(student, sums(8), distill={"teacher": "other"})
