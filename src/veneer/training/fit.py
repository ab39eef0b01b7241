"""Training an adapter on rows: the trainer with its callbacks, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from veneer.adapters import Adapter, files
from veneer.data import Part
from veneer.errors import ConfigError, Interrupted, OutputError, TrainingError, VeneerError
from veneer.tasks import Checked, Task
from veneer.training.checkpoints import Schedule, step_of
from veneer.training.course import Conduct
from veneer.training.distillation import Distillation
from veneer.training.folder import LOG
from veneer.training.guards import Overfitting, Patience, RunningAway
from veneer.training.interruption import Interruption
from veneer.training.preflight import Pace
from veneer.training.progress import Progress, Samples, console, peak_memory
from veneer.training.rows import TRAINING, VALIDATION
from veneer.training.settings import TrainSettings
from veneer.training.survey import survey, tell_trained
from veneer.training.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    Attributes:
        steps: optimiser steps done in all.
        seconds: it took, validations included; and what was logged of it before an interruption.
        tokens: seen in training, padding not counted; likewise.
        padding: share of what was computed that was none of them, but padding; likewise.
        trainable: numbers trained.
        trainable_share: the same as a share of the base's parameters.
        adapter_bytes: of what the adapter's files hold.
        base_bytes: of the base's parameters.
        peak_memory: bytes the process held at most.
        before: validation of the untrained adapter, or None without validation data.
        after: validation of the final weights, likewise.
        best_step: the step the final weights are from.
        warnings: what was noticed on the way, with what to do.
        earlier: of a continued adapter, how it does on what it learned before: for each data set ``data``, ``rows``,
            and metrics ``before`` and ``after`` this run; or ``missing``, why that cannot be told.
    """

    steps: int
    seconds: float
    tokens: int
    padding: float
    trainable: int
    trainable_share: float
    adapter_bytes: int
    base_bytes: int
    peak_memory: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_step: int
    warnings: tuple[str, ...] = ()
    earlier: tuple[dict[str, Any], ...] = ()


def fit(
    adapter: Adapter,
    task: Task,
    checked: Checked,
    settings: TrainSettings,
    output: Path,
    *,
    resume: Path | None = None,
    begin: Callable[[], None] = lambda: None,
    distillation: Distillation | None = None,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Train ``adapter`` on checked data in the run folder ``output``, from the checkpoint ``resume`` if there is one.

    ``begin`` is called once all is known to be right, before anything is written.

    Raises:
        ConfigError: a setting asks for what isn't there.
        TrainingError: the loss is no number any more, or has run away.
        OutputError: something cannot be written.
        Interrupted: a signal asked to stop.
    """
    base = adapter.base
    if resume is not None:
        looked = adapter.unsurveyed  # it had, before the run was cut off
        files.resume(adapter, resume)
        if looked:
            tell_trained(adapter)
    train_set, validation = checked.prepared[TRAINING], checked.prepared.get(VALIDATION)
    arguments = _arguments(adapter, settings, output, len(train_set.examples), validation is not None, resume)
    resumed_at = step_of(resume) if resume else None
    progress = Progress(output / LOG, lambda: (trainer.tokens_seen, trainer.places_seen), resumed_at)
    patience, overfitting = Patience(settings.patience or 0), Overfitting(settings.keep_best)
    interruption = Interruption()
    watching: list[Any] = [progress, RunningAway(), interruption, Pace(base.device, console), *callbacks]
    watching.append(Schedule(settings.checkpoint_interval, lambda: trainer.save_seconds))
    if validation is not None and settings.samples:
        held_out = checked.parts[VALIDATION].rows
        watching.append(Samples(adapter, task, list(held_out.select(range(min(settings.samples, len(held_out)))))))
    if validation is not None:
        watching += [overfitting, patience] if settings.patience else [overfitting]
    try:
        conduct = Conduct(adapter, resume)
        limit = settings.tokens_of_a_pass(base.device, train_set.examples["length"][:])
        trainer = Trainer(adapter, task, train_set, validation, arguments, watching, conduct, distillation, limit)
    except (ValueError, RuntimeError, ImportError) as error:  # a tracker or optimiser that isn't there
        raise ConfigError(f"train: {str(error).strip().splitlines()[0]}") from error
    begin()
    survey(adapter, task, train_set, settings)
    if settings.checkpointing:
        base.enable_checkpointing()
    try:
        with interruption:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except VeneerError as error:
        if isinstance(error, TrainingError) and error.rows:
            raise TrainingError(f"{error} {_shown(task, checked.parts[TRAINING], error.rows)}", error.rows) from error
        raise
    except OSError as error:
        raise OutputError(_lost(output, trainer.state.global_step, error)) from error
    finally:
        adapter.eval()
        if settings.checkpointing:
            base.disable_checkpointing()
    state = trainer.state
    if interruption.asked and state.global_step < state.max_steps:
        raise Interrupted(f"Stopped at step {state.global_step} of {state.max_steps}, as asked.")
    trained = adapter.trainable
    adapter.settle()
    return _result(
        adapter, trained, trainer, progress, tuple(told for told in (overfitting.noticed, patience.stopped) if told)
    )


def _result(adapter: Adapter, trained: int, trainer: Trainer, progress: Progress, warnings: tuple[str, ...]) -> Result:
    state = trainer.state
    best = (state.best_global_step if trainer.args.load_best_model_at_end else 0) or state.global_step
    validations = [entry for entry in progress.history if "eval_loss" in entry]
    return Result(
        steps=state.global_step,
        seconds=progress.seconds,
        tokens=progress.tokens,
        padding=1 - progress.tokens / progress.places if progress.places else 0.0,
        trainable=trained,
        trainable_share=adapter.share(trained),
        adapter_bytes=adapter.nbytes,
        base_bytes=adapter.base.nbytes,
        peak_memory=peak_memory(),
        before=_at(validations, 0),
        after=_at(validations, best),
        best_step=best,
        warnings=warnings,
    )


def _arguments(
    adapter: Adapter, settings: TrainSettings, output: Path, rows: int, validate: bool, resume: Path | None
) -> transformers.TrainingArguments:
    try:
        return transformers.TrainingArguments(
            **settings.arguments(
                output,
                rows=rows,
                learning_rate=settings.learning_rate or adapter.method.learning_rate,
                validate=validate,
            ),
            eval_on_start=validate and resume is None,
            use_cache=bool(getattr(adapter.config, "use_cache", False)),
            use_cpu=adapter.device.type == "cpu",
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train: {str(error).strip().splitlines()[0]}") from error


def _at(validations: list[dict[str, Any]], step: int) -> dict[str, float] | None:
    for entry in reversed(validations):
        if entry["step"] == step:
            return {
                name[5:]: value for name, value in entry.items() if name.startswith("eval_") and name != "eval_runtime"
            }
    return None


def _shown(task: Task, part: Part, indices: Sequence[int], most: int = 4) -> str:
    """Rows as people find them again: where they stand in the data, and how they begin."""
    lines = [f"\n  {part.where([index])}: {str(_question(task, part.rows[index]))[:100]!r}" for index in indices[:most]]
    more = f"\n  and {len(indices) - most} more" if len(indices) > most else ""
    return f"The rows of the batch:{''.join(lines)}{more}\n"


def _question(task: Task, row: dict[str, Any]) -> Any:
    return next((row[column] for column in task.asks_from if row.get(column) is not None), "")


def _lost(output: Path, step: int, error: OSError) -> str:
    if not output.is_dir():
        return (
            f"The folder {output} has vanished during the run, at step {step}; nothing more can be saved there. "
            "Start the run again, and keep its folder."
        )
    return (
        f"The run in {output} cannot go on at step {step}: {error}. What was saved before is untouched; "
        "once that is mended, the same command goes on from the last checkpoint."
    )
