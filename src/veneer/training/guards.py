"""What watches a run's losses: patience, overfitting, running away, numbers that are none.

All of it reads the trainer's own log history, which checkpoints keep: a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from veneer.adapters import Adapter
from veneer.errors import TrainingError
from veneer.tasks import Task
from veneer.training.progress import console

_STRETCH = 10
"""Steps over which a loss must have run away: batches of one length, an epoch's shortest, may be odd in a row."""
RUNAWAY, MARGIN = 3.0, 1.0
"""A loss has run away when it is above RUNAWAY times what it was at first, plus MARGIN: in training the higher of the
first two logged, in validation that of the untrained adapter."""
GROWN = 100.0
"""A number of an adapter that has become as large as this comes of a learning rate, not of a row."""
SIGNS = 2
"""Validations in a row with a higher loss than the best, while the training loss fell, that mean overfitting."""


class Patience(transformers.TrainerCallback):
    """Stops when the validation loss has not improved for so many validations in a row.

    Attributes:
        stopped: what was said when it did.
    """

    def __init__(self, validations: int) -> None:
        self.validations = validations
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a run at once that was cut off after it had been stopped."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count, and stop."""
        losses = _validations(state.log_history)
        best = min(range(len(losses)), key=lambda index: losses[index][1], default=0)
        if len(losses) - 1 - best < self.validations or state.global_step >= state.max_steps:
            return
        control.should_training_stop = True
        self.stopped = (
            f"Stopped early at step {state.global_step} of {state.max_steps}: the validation loss has not been below "
            f"{losses[best][1]:.4f} (step {losses[best][0]}) for {self.validations} validations (train.patience)."
        )
        console.print(f"[yellow]{self.stopped}[/yellow]")


class Overfitting(transformers.TrainerCallback):
    """Says so, once, when the validation loss rises while the training loss falls.

    Attributes:
        noticed: what was said.
    """

    def __init__(self, keep_best: bool) -> None:
        self.keep_best = keep_best
        self.noticed: str | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the best validation so far."""
        told = overfitting(state.log_history, self.keep_best)
        if told and not self.noticed:
            self.noticed = told
            console.print(f"[yellow]warning:[/yellow] {told}")


def overfitting(history: Sequence[Mapping[str, Any]], keep_best: bool) -> str | None:
    """What to say and do, if the validation loss rose since its best while the training loss fell."""
    losses = _validations(history)
    best, lowest = min(losses, key=lambda each: each[1])
    later = [loss for step, loss in losses if step > best]
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    until = [loss for step, loss in trained if step <= best]
    since = [loss for step, loss in trained if step > best]
    if len(later) < SIGNS or not until or not since or since[-1] >= until[-1]:
        return None
    kept = f"The weights of step {best} are kept. " if keep_best else ""
    return (
        f"overfitting: the validation loss rose from {lowest:.4f} at step {best} to {later[-1]:.4f}, while the "
        f"training loss fell from {until[-1]:.4f} to {since[-1]:.4f}. {kept}Stop there next time "
        f"(train.patience={SIGNS}, or fewer train.epochs), train on more rows, or train less: "
        "a lower train.learning_rate, fewer targets."
    )


class RunningAway(transformers.TrainerCallback):
    """Ends a run whose loss has left the range it started in, before that is saved."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Compare with the first losses.

        Raises:
            TrainingError: it has run away.
        """
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        logs_each = math.ceil(_STRETCH / args.logging_steps)  # one odd batch is no runaway
        if "loss" in (logs or {}) and len(losses) > 2 * logs_each:
            what = f"at least, in the steps up to {state.global_step}"
            self._check(min(losses[-logs_each:]), max(losses[: 2 * logs_each]), what, args.learning_rate)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the validation before the first step; where training goes well all the same, it is overfitting.

        Raises:
            TrainingError: it has run away.
        """
        (_, first), *later = _validations(state.log_history)
        trained = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if later and not (trained and trained[-1] < trained[0]):
            self._check(later[-1][1], first, f"in validation at step {state.global_step}", args.learning_rate)

    @staticmethod
    def _check(loss: float, usual: float, what: str, rate: float) -> None:
        if loss > RUNAWAY * usual + MARGIN:
            raise TrainingError(
                f"The loss has run away: it is {loss:.4g} {what}, after {usual:.4g} at first. Likely cause: a learning "
                f"rate that is too high (it is {rate:.1e}).",
                diverged=True,
            )


def not_finite(
    what: str,
    step: int,
    rate: float,
    adapter: Adapter,
    task: Task,
    batch: Mapping[str, Tensor] | None,
    rows: Sequence[int],
) -> TrainingError:
    """An error that names step, rows and likely cause of a loss or gradient that is no finite number.

    Args:
        what: is wrong, e.g. ``loss is nan``.
        step: at which.
        rate: the learning rate there.
        adapter: what is trained.
        task: what for.
        batch: the batch whose loss it is, if it is one's.
        rows: indices of the rows it happened on.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in adapter.parameters()):
        alone: Sequence[int] = []
        diverged = True
        cause = "the last update made the weights overflow, so the learning rate is too high"
    else:
        alone = _alone(adapter, task, batch, rows) if batch is not None else []
        # A row is to blame if the base can't bear it either.
        diverged = not alone or bool(batch is not None and not _alone(adapter, task, batch, rows, plain=True))
        if not diverged and len(alone) < len(rows):
            cause = "something in these rows, since the others of the batch are fine"
        elif adapter.base.dtype == torch.float16:
            cause = "float16, which overflows above 65,504; set dtype=bfloat16 or float32"
        else:
            cause = "weights that have grown too large, so the learning rate is too high"
            diverged = True
    message = f"The {what} at step {step}, at a learning rate of {rate:.1e}. Likely cause: {cause}."
    grown = not all(float(parameter.detach().abs().max()) <= GROWN for parameter in adapter.parameters())  # or NaN
    blamed = () if diverged and (batch is not None or grown) else alone or rows
    return TrainingError(message, blamed, diverged=diverged)


def _alone(
    adapter: Adapter, task: Task, batch: Mapping[str, Tensor], rows: Sequence[int], *, plain: bool = False
) -> list[int]:
    """Those rows of a batch that give no finite loss by themselves, under the adapter or the plain base."""
    found = []
    model = adapter.base.model if plain else adapter
    with torch.no_grad(), adapter.base.using(None):
        for index, row in enumerate(rows):
            loss = task.outcome(model, {name: value[index : index + 1] for name, value in batch.items()}).loss
            if not torch.isfinite(loss):
                found.append(row)
    return found


def _validations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
