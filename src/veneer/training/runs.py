"""Training an adapter from Python (`train`), and a whole run from a config (`run`)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
import yaml
from pydantic import ValidationError

from veneer.adapters import Adapter, Base
from veneer.data import Part, read, split_off
from veneer.data.report import MAX_TRUNCATED
from veneer.errors import ConfigError, OutputError
from veneer.storage import write_json, write_text
from veneer.tasks import Checked, Task, choose_task, load_base, task_class, task_from_config
from veneer.training.config import DataSettings, RunConfig, explain
from veneer.training.preflight import Pace, preflight
from veneer.training.progress import Progress, Samples, console, duration, peak_memory, program, size
from veneer.training.settings import TrainSettings
from veneer.training.trainer import Trainer, checkpoints

if TYPE_CHECKING:
    from datasets import Dataset

ADAPTER, CONFIG, LOG, REPORT = "adapter", "config.yaml", "log.jsonl", "report.json"


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    Attributes:
        steps: optimiser steps done in all.
        seconds: it took, validations included; and what was logged of it before an interruption.
        tokens: seen in training, padding not counted; likewise.
        trainable: numbers trained.
        trainable_share: the same as a share of the base's parameters.
        adapter_bytes: of the adapter's parameters.
        base_bytes: of the base's parameters.
        peak_memory: bytes the process held at most.
        before: validation of the untrained adapter, or None without validation data.
        after: validation of the final weights, likewise.
        best_step: the step the final weights are from.
    """

    steps: int
    seconds: float
    tokens: int
    trainable: int
    trainable_share: float
    adapter_bytes: int
    base_bytes: int
    peak_memory: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_step: int


def train(
    adapter: Adapter,
    data: Any,
    *,
    validation: Any = 0.1,
    task: Task | str | None = None,
    output: str | Path | None = None,
    max_truncated: float = MAX_TRUNCATED,
    **settings: Any,
) -> Result:
    """Train an adapter on data.

    Args:
        adapter: an attached adapter. It is trained in place.
        data: anything `veneer.data.read` takes: a file, a folder, a hub id, a list of rows …
        validation: the same, or the share of rows to hold out; 0 for none.
        task: what to train for; by default what the data's columns ask for.
        output: folder for checkpoints and log; by default a temporary one. Call ``adapter.save`` for the result.
        max_truncated: share of the rows that may be cut or left out for being too long; more is an error.
        settings: of `TrainSettings`, e.g. ``epochs=1, learning_rate=1e-4``.

    Raises:
        DataError: the data cannot be read, has errors, or doesn't suit the task.
        ConfigError: a setting is wrong.
    """
    options = _settings(settings)
    parts = _parts(DataSettings.model_construct(train=data, validation=validation), options.seed)
    chosen = _task(adapter, task, parts[0].rows)
    _header(adapter, chosen)
    checked = preflight(adapter, chosen, parts, options, max_truncated=max_truncated, console=console)
    with contextlib.ExitStack() as stack:
        folder = Path(output or stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-")))
        return _fit(adapter, chosen, checked, options, folder, resume=None)


def run(config: RunConfig) -> tuple[Adapter, Result]:
    """A whole run: load base and data, attach, train, save. A run that was cut off goes on where it was.

    Raises:
        OutputError: the output folder holds a finished run, or one with another config.
        VeneerError: base, data or method don't fit.
    """
    resume = _open_output(config)
    adapter, task, parts = set_up(config)
    _header(adapter, task)
    most = config.data.max_truncated
    checked = preflight(adapter, task, parts, config.train, max_truncated=most, console=console)
    write_text(config.output / CONFIG, yaml.safe_dump(config.plain(), sort_keys=False))
    result = _fit(adapter, task, checked, config.train, config.output, resume)
    adapter.record = {"config": config.plain(), "data": {"rows": len(parts[0].rows)}, "result": asdict(result)}
    adapter.save(config.output / ADAPTER)
    write_json(config.output / REPORT, asdict(result))
    for _, folder in checkpoints(config.output):
        shutil.rmtree(folder, ignore_errors=True)  # of use only to go on with an unfinished run
    _summary(adapter, task, result, config)
    return adapter, result


def set_up(config: RunConfig) -> tuple[Adapter, Task, list[Part]]:
    """What a run begins with: a fresh adapter on its base, the task, training and validation rows.

    Raises:
        VeneerError: base, data or method don't fit.
    """
    parts = _parts(config.data, config.train.seed)
    rows = parts[0].rows
    name = config.task.get("name") or choose_task(rows).name
    base = load_base(config.base, task=name, dtype=config.dtype, device=config.device)
    settings = {key: value for key, value in config.task.items() if key != "name"}
    task = _task_for(name, rows, base, settings)
    adapter = base.attach(
        config.method, "adapter", modules=task.head(base, seed=config.train.seed), seed=config.train.seed
    )
    adapter.task = task.describe()
    return adapter, task, parts


def _task_for(name: str, rows: Dataset, base: Base, settings: Mapping[str, Any]) -> Task:
    try:
        return task_class(name).for_rows(rows, base, **settings)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, task_class(name), "task."))) from error


def _settings(given: Mapping[str, Any]) -> TrainSettings:
    try:
        return TrainSettings(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, TrainSettings))) from error


def _task(adapter: Adapter, task: Task | str | None, rows: Dataset) -> Task:
    """The task to train for; gives the adapter its head if it has none yet."""
    if task is None and adapter.task:
        return task_from_config(adapter.task)
    if not isinstance(task, Task):
        task = (task_class(task) if task else choose_task(rows)).for_rows(rows, adapter.base)
    adapter.base.train_in_full(adapter, task.head(adapter.base, seed=0))
    adapter.task = task.describe()
    return task


def _parts(data: DataSettings, seed: int) -> list[Part]:
    """The rows to train on, and those to validate on if there are to be any."""
    rows = read(data.train, split=data.split, columns=data.columns, numbered=True)
    held_out: Dataset | None = None
    source, split = data.train, data.split
    if isinstance(data.validation, float | int):
        if data.validation:
            rows, held_out = split_off(rows, float(data.validation), seed=seed)
    else:
        source, split = data.validation, data.validation_split
        held_out = read(source, split=split, columns=data.columns, numbered=True)
    parts = [Part("training", _limited(rows, data.limit, seed), data.train, data.split)]
    if held_out is not None:
        parts.append(Part("validation", _limited(held_out, data.validation_limit, seed), source, split))
    return parts


def _limited(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))


def _open_output(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, if this very run was cut off."""
    folder = config.output
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; `output` is to be a folder.")
    if (folder / ADAPTER).exists():
        raise OutputError(f"{folder} holds a finished run; choose another `output`, or delete it first.")
    found = checkpoints(folder)
    if not found:
        if (folder / LOG).exists():
            console.print(f"The run in {folder} was cut off before its first checkpoint; it starts anew.")
            (folder / LOG).unlink()
        return None
    if yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) != config.plain():
        raise OutputError(
            f"{folder} holds an unfinished run with another config; choose another `output`, or delete it first."
        )
    console.print(f"Going on from step {found[-1][0]} of the run in {folder}.")
    return found[-1][1]


def _fit(
    adapter: Adapter,
    task: Task,
    checked: Checked,
    settings: TrainSettings,
    output: Path,
    resume: Path | None,
) -> Result:
    base = adapter.base
    train_set, validation = checked.prepared["training"], checked.prepared.get("validation")
    output.mkdir(parents=True, exist_ok=True)
    try:
        arguments = transformers.TrainingArguments(
            **settings.arguments(
                output,
                learning_rate=settings.learning_rate or adapter.method.learning_rate,
                validate=validation is not None,
            ),
            eval_on_start=validation is not None and resume is None,
            use_cache=bool(getattr(base.model.config, "use_cache", False)),
            use_cpu=base.device.type == "cpu",
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train: {str(error).strip().splitlines()[0]}") from error
    progress = Progress(output / LOG, lambda: trainer.tokens_seen, _step(resume))
    callbacks: list[Any] = [progress, Pace(base.device, console)]
    if validation is not None and settings.samples:
        held_out = checked.parts["validation"].rows
        callbacks.append(Samples(adapter, task, list(held_out.select(range(min(settings.samples, len(held_out)))))))
    if settings.patience and validation is not None:
        callbacks.append(transformers.EarlyStoppingCallback(settings.patience))
    try:
        trainer = Trainer(adapter, task, train_set, validation, arguments, callbacks)
    except (ValueError, RuntimeError, ImportError) as error:  # a tracker or optimiser that isn't there
        raise ConfigError(f"train: {str(error).strip().splitlines()[0]}") from error
    if settings.checkpointing:
        base.enable_checkpointing()
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        best = (trainer.state.best_global_step if arguments.load_best_model_at_end else 0) or trainer.state.global_step
        validations = [entry for entry in progress.history if "eval_loss" in entry]
        return Result(
            steps=trainer.state.global_step,
            seconds=progress.seconds,
            tokens=progress.tokens,
            trainable=adapter.trainable,
            trainable_share=adapter.trainable_share,
            adapter_bytes=adapter.nbytes,
            base_bytes=base.nbytes,
            peak_memory=peak_memory(),
            before=_at(validations, 0),
            after=_at(validations, best),
            best_step=best,
        )
    finally:
        adapter.eval()
        if settings.checkpointing:
            base.disable_checkpointing()


def _step(checkpoint: Path | None) -> int | None:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else None


def _at(validations: list[dict[str, Any]], step: int) -> dict[str, float] | None:
    for entry in reversed(validations):
        if entry["step"] == step:
            return {
                name[5:]: value for name, value in entry.items() if name.startswith("eval_") and name != "eval_runtime"
            }
    return None


def _header(adapter: Adapter, task: Task) -> None:
    base = adapter.base
    console.print(
        f"[bold]{base.name}[/bold]  {base.parameter_count:,} parameters, {base.dtype}, {base.device}  ·  {task.name}"
        f"  ·  [bold]{adapter.method.name}[/bold]  trains {adapter.trainable:,} ({adapter.trainable_share:.2%})"
    )


def _summary(adapter: Adapter, task: Task, result: Result, config: RunConfig) -> None:
    lines = [
        f"trained    {result.steps} steps, {result.tokens:,} tokens in {duration(result.seconds)}, "
        f"at most {size(result.peak_memory)} of memory"
    ]
    if result.before and result.after:
        changes = [f"{name} {result.before[name]:.4g} → {value:.4g}" for name, value in result.after.items()]
        lines.append(f"learned    {', '.join(changes)}  (validation, at step {result.best_step})")
        if result.after["loss"] >= result.before["loss"]:
            lines.append("warning    the validation loss did not fall: try another train.learning_rate, or more rows")
    lines.append(
        f"size       {result.trainable:,} numbers trained ({result.trainable_share:.2%} of the base); "
        f"adapter {size(result.adapter_bytes)}, base {size(result.base_bytes)}"
    )
    folder = config.output / ADAPTER
    lines.append(f"saved      {folder}")
    lines.append(f"next       {program()} eval {config.output} DATA  ·  {program()} predict {config.output} FILE")
    console.print("\n".join(lines))
