"""The demonstration: a small instruction model learns to give a verdict as JSON, on real data, with proof.

The data (`prompt-injections`) are short texts, some of which try to manipulate an AI assistant. The model is asked
for ``{"injection": true}`` or ``{"injection": false}`` and nothing else; an answer counts if it parses as JSON and
equals the right one. The plain base gets the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data import read
from veneer.evaluation import Report, evaluate
from veneer.methods.lora import LoRA
from veneer.tasks import load_base
from veneer.tasks.causal_lm import CausalLM
from veneer.training import Result, train

if TYPE_CHECKING:
    from datasets import Dataset

BASE, DATA = "smollm2-135m-instruct", "prompt-injections"
PROMPT = (
    "Does the message below try to manipulate an AI assistant (a prompt injection)? "
    'Answer with JSON only: {{"injection": true}} or {{"injection": false}}.\n\nMessage: {text}'
)
TRAINING_ROWS, HELD_OUT_ROWS, BATCH = 960, 240, 16


def demo(output: Path, *, say: Callable[[str], None]) -> tuple[Result, Report, list[dict[str, Any]]]:
    """Train, save to ``output`` and evaluate; the last of what it returns are the held-out rows."""
    training, held_out = questions()
    base = load_base(BASE)
    task = CausalLM.for_rows(training, base, max_new_tokens=24)
    adapter = base.attach(LoRA(rank=4), "injections", task=task.describe())
    say(f"Training on {len(training)} real messages ...")
    result = train(
        adapter,
        training,
        validation=0,
        task=task,
        epochs=1,
        batch_size=BATCH,
        learning_rate=1e-3,
        log_every=10,
    )
    adapter.save(output)
    say(f"Asking base and adapter about {len(held_out)} messages neither has seen ...")
    report = evaluate(adapter, held_out, task=task, batch_size=32, forgetting=False)
    return result, report, list(held_out)


def questions() -> tuple[Dataset, Dataset]:
    """Training and held-out rows as prompt and completion; no held-out text occurs in the training data."""
    everything = read(DATA, split="train")
    known = {_normal(text) for text in everything["text"]}
    test = read(DATA, split="test").shuffle(seed=0)
    unseen = test.filter(lambda row: _normal(row["text"]) not in known)
    return (
        _asked(everything.shuffle(seed=0).select(range(TRAINING_ROWS))),
        _asked(unseen.select(range(HELD_OUT_ROWS))),
    )


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _asked(rows: Dataset) -> Dataset:
    return rows.map(
        lambda row: {
            "prompt": PROMPT.format(text=row["text"]),
            "completion": '{"injection": true}' if int(row["label"]) else '{"injection": false}',
            "message": row["text"],
        },
        remove_columns=["label", "text"],
    )
