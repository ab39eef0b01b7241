"""A learning-rate range test (Smith 2015, arXiv:1506.01186, §3.3; stopping and reading as in practice since).

The rate rises exponentially, a step each, from far too small to far too large. While it is too small the loss stays
where it is; then it falls, ever faster; then it explodes, which ends the test. Read from the curve, smoothed by a
Gaussian window that is centred, so that it doesn't lag:

    steepest      the rate at which the loss falls fastest, before its minimum
    diverged_at   the rate at which the loss reached four times its minimum, or was no number any more
    suggestion    steepest, but at most a tenth of diverged_at; none where the loss did not fall beyond its noise
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from torch.optim.lr_scheduler import LambdaLR

from veneer.adapters import Adapter
from veneer.errors import ConfigError, TrainingError
from veneer.tasks import Task
from veneer.training.settings import TrainSettings
from veneer.training.survey import survey
from veneer.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

EXPLODED = 4.0
"""A loss of this many times the lowest one ends the test."""
CLEAR = 1.5
"""A fall counts if it is this many times the spread of single steps around the curve (a window's is a third of it)."""
DECADES = 3
"""The test goes this many decades below and above the method's own default."""
_WINDOW = 3.0  # standard deviation of the smoothing window, in steps
_FEWEST = 20


@dataclass(frozen=True)
class Curve:
    """What a range test found.

    Attributes:
        rates: learning rate of each step.
        losses: of each step, before its update.
        smoothed: the same, smoothed.
        prior: the method's own default.
        steepest: the rate at which the loss falls fastest, or None if it never fell.
        diverged_at: the rate at which it exploded, or None if it never did.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    prior: float
    steepest: float | None
    diverged_at: float | None

    @property
    def suggestion(self) -> float | None:
        """The rate to train with, rounded to one digit and a half; None if the test shows none."""
        if self.steepest is None:
            return None
        rate = min(self.steepest, (self.diverged_at or math.inf) / 10)
        return _rounded(rate)


def find_learning_rate(
    adapter: Adapter,
    task: Task,
    rows: Dataset,
    settings: TrainSettings | None = None,
    *,
    steps: int = 100,
    low: float | None = None,
    high: float | None = None,
) -> Curve:
    """Run a range test. Adapter and base are afterwards what they were before.

    Args:
        adapter: an attached adapter.
        task: what it is to learn.
        rows: to learn from; as many as the steps need are drawn from them.
        settings: batch size, accumulation, optimiser and clipping as the training will have them.
        steps: optimiser steps at most.
        low: rate of the first step; by default a thousandth of the method's own default.
        high: rate of the last step; by default a thousand times it.

    Raises:
        ConfigError: the range is empty, or the steps are too few to read anything from.
    """
    settings = settings or TrainSettings()
    prior = adapter.method.learning_rate
    low, high = low or prior / 10**DECADES, high or prior * 10**DECADES
    if not low < high:
        raise ConfigError(f"The learning rate is to rise, but low is {low:g} and high is {high:g}.")
    if steps < _FEWEST:
        raise ConfigError(f"A range test needs at least {_FEWEST} steps; {steps} show nothing.")
    rates = [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]
    enough = steps * settings.batch_size * settings.accumulation
    rows = rows.shuffle(seed=settings.seed).select(range(min(enough, len(rows))))
    unsurveyed, state = adapter.unsurveyed, adapter.state
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    recorder = _Recorder()
    try:
        exploded = _run(adapter, task, rows, settings, rates, recorder)
    finally:
        if unsurveyed:  # it starts from its data again next time
            adapter.replace(*state)
            adapter.unsurveyed = True
        adapter.load_state_dict(before)
        adapter.zero_grad(set_to_none=True)
        adapter.eval()
    return read(rates[: len(recorder.losses)], recorder.losses, prior, exploded)


def read(rates: Sequence[float], losses: Sequence[float], prior: float, exploded: bool) -> Curve:
    """What a curve says; ``exploded`` if it ends where the loss did."""
    smoothed = _smooth(losses)
    lowest = int(np.argmin(smoothed))
    steepest = None
    noise = np.std(np.asarray(losses[: lowest + 1]) - smoothed[: lowest + 1])
    if lowest > 1 and smoothed[0] - smoothed[lowest] > CLEAR * noise:
        falls = np.gradient(smoothed[: lowest + 1], np.log(rates[: lowest + 1]))
        steepest = rates[int(np.argmin(falls))]
    return Curve(
        rates=list(rates),
        losses=list(losses),
        smoothed=smoothed.tolist(),
        prior=prior,
        steepest=steepest,
        diverged_at=rates[-1] if exploded and rates else None,
    )


def _run(
    adapter: Adapter, task: Task, rows: Dataset, settings: TrainSettings, rates: Sequence[float], recorder: _Recorder
) -> bool:
    """Train along the rates; whether the loss exploded."""
    if adapter.base.tokenizer is None:
        raise ConfigError(f"{adapter.base.name} has no tokenizer; pass one: veneer.Base(model, tokenizer).")
    train_set = task.prepare(rows, adapter.base.tokenizer)
    survey(adapter, task, train_set, settings)
    with tempfile.TemporaryDirectory(prefix="veneer-") as folder:
        known = settings.arguments(Path(folder), rows=len(train_set.examples), learning_rate=1.0, validate=False)
        options: dict[str, Any] = known | {
            "max_steps": len(rates),
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "train_sampling_strategy": "random",  # by length, short and long batches would be mistaken for progress
            "use_cpu": adapter.base.device.type == "cpu",
        }
        arguments = transformers.TrainingArguments(**options)
        limit = settings.tokens_of_a_pass(adapter.device, train_set.examples["length"][:])
        trainer = _Ramp(adapter, task, train_set, None, arguments, [recorder], pass_tokens=limit)
        trainer.rates = rates
        if settings.checkpointing:
            adapter.base.enable_checkpointing()
        try:
            trainer.train()
        except TrainingError:  # no number any more
            recorder.exploded = True
        finally:
            if settings.checkpointing:
                adapter.base.disable_checkpointing()
    return recorder.exploded


class _Ramp(Trainer):
    """Trains with a given learning rate at each step."""

    rates: Sequence[float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        last = len(self.rates) - 1
        self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, lambda step: self.rates[min(step, last)])
        return self.lr_scheduler


class _Recorder(transformers.TrainerCallback):
    """Keeps the losses, and ends the test when they explode."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.exploded = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """One step's loss."""
        if logs is None or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        recent = float(np.mean(self.losses[-3:]))
        lowest = float(np.min(_smooth(self.losses)))
        if len(self.losses) > 3 and recent > EXPLODED * lowest:
            self.exploded = control.should_training_stop = True


def _smooth(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each value as the mean of its neighbourhood, weighted by a Gaussian window."""
    index = np.arange(len(values))
    weights = np.exp(-0.5 * ((index[:, None] - index[None, :]) / _WINDOW) ** 2)
    return weights @ np.asarray(values, dtype=np.float64) / weights.sum(1)


def _rounded(rate: float) -> float:
    """Down to 1, 1.5, 2, 3, 5 or 7 of its decade: more digits than these would pretend."""
    decade = 10.0 ** math.floor(math.log10(rate))
    return float(f"{max(step for step in (1, 1.5, 2, 3, 5, 7) if step * decade <= rate * 1.0001) * decade:.2g}")
