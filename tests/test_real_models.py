"""What counts: real models learn real tasks."""

from __future__ import annotations

import numpy as np
import pytest

import veneer
from veneer.data import read
from veneer.evaluation.comparison.statistics import Scores, difference
from veneer.tasks.sequence_classification import SequenceClassification

ROWS = np.ones(800)


def test_lora_beats_a_trained_head_on_the_frozen_base(minilm: veneer.Base) -> None:
    """Prompt-injection classification, 800 rows to learn from, 800 held out. The head gets four times the epochs."""
    rows = read("prompt-injections").shuffle(seed=0).select(range(800))
    held_out = read("prompt-injections", split="test").shuffle(seed=0).select(range(800))
    task = SequenceClassification.for_rows(rows, minilm)
    scores, right = {}, {}
    for method, epochs in ((veneer.HeadOnly(), 8), (veneer.LoRA(rank=8), 2)):
        adapter = minilm.attach(method, method.name, modules=task.head(minilm, seed=0), task=task.describe())
        veneer.train(adapter, rows, validation=0, epochs=epochs, batch_size=16)
        report = veneer.evaluate(adapter, held_out, base=False)
        scores[method.name] = report.adapter["accuracy"].value
        answers = zip(report.predictions, held_out["label"], strict=True)
        right[method.name] = Scores(
            np.array([[float(got["label"] == str(label)) for got, label in answers]]), ROWS, [0]
        )
        assert right[method.name].means.mean() == pytest.approx(scores[method.name])
    assert scores["head"] > 0.8  # else it is no opponent
    more = difference(right["lora"], right["head"])  # row by row: other dropout alone moves LoRA by a point
    assert more is not None
    assert more.low > 0


def test_smollm_learns_an_answer_format(smollm: veneer.Base) -> None:
    """A few steps of the demonstration: from rambling to JSON."""
    from veneer.demo import questions
    from veneer.tasks.causal_lm import CausalLM

    training, held_out = questions()
    assert not set(training["prompt"]) & set(held_out["prompt"])
    task = CausalLM(max_new_tokens=16)
    adapter = smollm.attach(veneer.LoRA(rank=4), task=task.describe())
    few = training.select(range(96))
    veneer.train(adapter, few, validation=0, epochs=1, batch_size=8, learning_rate=1e-3)
    report = veneer.evaluate(adapter, held_out, limit=60)  # of 24 rows half must be right to tell it from the base
    assert report.base is not None
    assert report.adapter["json_match"].low > report.base["json_match"].high  # type: ignore[operator]
    assert report.adapter["loss"].value < report.base["loss"].value / 3
