from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import veneer
from helpers import perturb, sums, write_jsonl
from veneer.errors import AdapterError, DataError, OutputError, TargetError
from veneer.evaluation import predict_file, wilson
from veneer.evaluation.intervals import of_mean
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.sequence_classification import SequenceClassification


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, rows) == pytest.approx((low, high), abs=5e-5)


def test_interval_of_a_mean() -> None:
    assert of_mean([1.0, 0.0, 1.0, 1.0]) == wilson(3, 4)
    low, high = of_mean([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert high - low == pytest.approx(2 * 1.959964 / 3**0.5, rel=1e-6)


@pytest.fixture
def adapter(tiny_folder: Path) -> veneer.Adapter:
    base = veneer.load_base(tiny_folder, dtype="float32")
    adapter = base.attach(veneer.LoRA(rank=2), "t", task=CausalLM(max_new_tokens=4).describe())
    perturb(adapter, std=0.3)
    return adapter


def test_base_and_adapter_beside_each_other(adapter: veneer.Adapter) -> None:
    report = veneer.evaluate(adapter, sums(6), batch_size=4)
    assert report.rows == 6
    assert report.base is not None
    assert {"loss", "perplexity", "token_accuracy", "exact_match"} == set(report.adapter) == set(report.base)
    assert abs(report.adapter["loss"].value - report.base["loss"].value) > 1e-3
    assert report.adapter["exact_match"].low == 0
    assert report.adapter["exact_match"].high == pytest.approx(wilson(0, 6)[1])
    alone = [next(iter(veneer.predict(adapter, [row])))["output"] for row in sums(6)]
    assert [answer["output"] for answer in report.predictions] == alone  # in the order of the rows
    adapter.base.detach("t")


def test_mixtures_are_scored_by_task(adapter: veneer.Adapter) -> None:
    rows = [{**row, "task": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(sums(5))]
    report = veneer.evaluate(adapter, rows, base=False)
    assert {name: set(scores) for name, scores in report.by_task.items()} == {
        "even": {"exact_match"},
        "odd": {"exact_match"},
    }
    assert json.dumps(report.plain())


def test_rows_of_another_task_are_refused(adapter: veneer.Adapter, tiny_folder: Path) -> None:
    with pytest.raises(DataError, match="takes rows with messages; or prompt, completion; or text"):
        veneer.evaluate(adapter, [{"text": "a", "label": "b"}])
    taskless = adapter.base.attach(veneer.LoRA(rank=2), "other")
    with pytest.raises(AdapterError, match="does not say what task"):
        veneer.evaluate(taskless, sums(2))


def test_predict_file_writes_rows_with_answers(adapter: veneer.Adapter, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", [{"prompt": row["prompt"], "id": n} for n, row in enumerate(sums(5))])
    count, cut = predict_file(adapter, "in.jsonl", "out.jsonl")
    assert (count, cut) == (5, 5)  # four tokens are too few for any of them
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(5))
    assert all(set(line) == {"prompt", "id", "output", "finished"} for line in lines)
    predict_file(adapter, "in.jsonl", "out.csv")
    with (folder / "out.csv").open(newline="") as file:
        assert [row["output"] for row in csv.DictReader(file)] == [line["output"] for line in lines]


def test_predict_file_refuses_and_leaves_the_old_file(
    adapter: veneer.Adapter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(folder / "in.jsonl", sums(3))
    write_jsonl(folder / "odd.jsonl", [{"question": "a"}])
    (folder / "out.jsonl").write_text("old")
    with pytest.raises(OutputError, match=r"\.jsonl or \.csv"):
        predict_file(adapter, "in.jsonl", "out.txt")
    with pytest.raises(DataError, match=r"none of the columns prompt, messages, text.*--columns prompt=NAME"):
        predict_file(adapter, "odd.jsonl", "out.jsonl")

    def fails(*_: object, **__: object) -> object:
        yield {"output": "one"}
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLM, "predict", fails)
    with pytest.raises(KeyboardInterrupt):
        predict_file(adapter, "in.jsonl", "out.jsonl")
    assert (folder / "out.jsonl").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "odd.jsonl", "out.jsonl"]


def test_classification_is_compared_with_the_commonest_answer(minilm: veneer.Base) -> None:
    task = SequenceClassification(labels=("a", "b"))
    adapter = minilm.attach(veneer.LoRA(rank=2), modules=task.head(minilm, seed=0), task=task.describe())
    report = veneer.evaluate(adapter, [{"text": "x", "label": label} for label in "aaab"])
    assert report.base is not None
    assert report.base["accuracy"].value == 0.75
    assert report.compared_with == "commonest answer"
    assert {"loss", "accuracy"} == set(report.adapter)


def test_classification_from_python_is_saved_and_loaded_again(folder: Path) -> None:
    base = veneer.load_base("minilm-l6", task="sequence-classification")
    adapter = base.attach(veneer.LoRA(rank=2), "a")
    rows = [{"text": "x", "label": "yes"}, {"text": "y", "label": "no"}] * 4
    veneer.train(adapter, rows, validation=0, max_steps=2)
    assert set(adapter.modules_in_full) == {"classifier"}
    before = list(veneer.predict(adapter, rows))
    adapter.save("saved")
    assert list(veneer.predict(veneer.load_adapter("saved"), rows)) == before
    plain = veneer.load_base("minilm-l6")
    with pytest.raises(TargetError, match=r"BertModel has no classifier.*Load the base with that task"):
        plain.load("saved")
    assert not plain.adapters


def test_files_are_left_as_they_are(minilm: veneer.Base, folder: Path) -> None:
    """Odd cells stay what they are; an answer hides no column; the input is never the output."""
    (folder / "in.csv").write_text("text,label,id\ngood,None,007\nbad,NA,\n")
    task = SequenceClassification(labels=("None", "NA"))
    adapter = minilm.attach(veneer.LoRA(rank=2), modules=task.head(minilm, seed=0), task=task.describe())
    predict_file(adapter, "in.csv", "out.csv")
    with (folder / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["label"], line["id"]) for line in lines] == [("None", "007"), ("NA", "")]
    assert {line["predicted_label"] for line in lines} <= {"None", "NA"}
    write_jsonl(folder / "in.jsonl", [{"body": "x", "created": "2024-01-01T10:00:00"}])
    predict_file(adapter, "in.jsonl", "out.jsonl", columns={"text": "body"})
    line = json.loads((folder / "out.jsonl").read_text())
    assert (line["body"], line["created"]) == ("x", "2024-01-01T10:00:00")
    with pytest.raises(OutputError, match="the file the rows come from"):
        predict_file(adapter, "in.csv", "in.csv")


def test_rows_from_python_without_a_question(adapter: veneer.Adapter) -> None:
    rows = [{"prompt": "What is 1 + 1?"}, {"promt": "x"}]
    with pytest.raises(DataError, match=r"Row 2 has promt; task causal-lm asks from .*Did you mean 'prompt'"):
        list(veneer.predict(adapter, rows, max_new_tokens=2))
