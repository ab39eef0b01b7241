from __future__ import annotations

import pytest
import torch

import veneer
from helpers import tiny_llama
from veneer.data import read
from veneer.errors import BaseError, DataError
from veneer.tasks.sequence_classification import SequenceClassification

ROWS = [{"text": "good thing", "label": "yes"}, {"text": "bad", "label": "no"}, {"text": "hm", "label": "maybe"}]


def test_labels_come_from_the_data() -> None:
    assert SequenceClassification.for_rows(read(ROWS), None).labels == ("maybe", "no", "yes")
    with pytest.raises(DataError, match="2 to 1000 different labels; the data has 1"):
        SequenceClassification.for_rows(read(ROWS[:1]), None)


def test_an_unknown_label_is_named(minilm: veneer.Base) -> None:
    task = SequenceClassification(labels=("yes", "no"))
    with pytest.raises(DataError, match=r"Label 'yess' is none of those learned: yes, no. Did you mean 'yes'"):
        task.encode({"text": "x", "label": "yess"}, minilm.tokenizer)


def test_the_head_has_an_output_for_each_label_and_is_the_seeds(minilm: veneer.Base) -> None:
    task = SequenceClassification(labels=("a", "b", "c", "d"))
    head = task.head(minilm, seed=3)
    assert {name: list(value.shape) for name, value in head["classifier"].items()} == {"weight": [4, 384], "bias": [4]}
    assert torch.equal(head["classifier"]["weight"], task.head(minilm, seed=3)["classifier"]["weight"])
    assert not torch.equal(head["classifier"]["weight"], task.head(minilm, seed=4)["classifier"]["weight"])


def test_a_base_without_such_a_head_says_how_to_load_it() -> None:
    with pytest.raises(BaseError, match='task="sequence-classification"'):
        SequenceClassification(labels=("a", "b")).head(veneer.Base(tiny_llama()), seed=0)


def test_predictions_and_scores(minilm: veneer.Base) -> None:
    task = SequenceClassification(labels=("no", "yes", "maybe"))
    adapter = minilm.attach(veneer.LoRA(rank=2), modules=task.head(minilm, seed=0))
    answers = list(task.predict(adapter, minilm, ROWS))
    assert all(abs(sum(answer["probabilities"].values()) - 1) < 1e-5 for answer in answers)
    assert all(answer["label"] in task.labels for answer in answers)
    assert task.score(ROWS, [{"label": "yes"}] * 3) == {"accuracy": [1, 0, 0]}
    assert task.score([{"text": "x"}], [{"label": "yes"}]) == {}
    assert task.commonest([*ROWS, ROWS[0]]) == {"accuracy": [1, 0, 0, 1]}


def test_padding_changes_nothing(minilm: veneer.Base) -> None:
    task = SequenceClassification(labels=("no", "yes", "maybe"))
    adapter = minilm.attach(veneer.LoRA(rank=2), modules=task.head(minilm, seed=0))
    together = list(task.predict(adapter, minilm, [*ROWS, {"text": "a much longer text " * 10}]))[:3]
    for row, answer in zip(ROWS, together, strict=True):
        (alone,) = task.predict(adapter, minilm, [row])
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], rel=1e-5)
