"""Training an adapter from Python (`train`), and whole runs from a config (`run`) or from a record (`reproduce`)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from veneer.adapters import Adapter, Base
from veneer.adapters.files import adapter_folder, read_method, read_record, weights_hash
from veneer.data import Part
from veneer.data.report import MAX_TRUNCATED
from veneer.errors import AdapterFileError, ConfigError, Interrupted, TrainingError
from veneer.tasks import Task, adapter_task, choose_task, load_base, task_class, task_from_config
from veneer.tasks.conditions import names_of
from veneer.training import facts, folder
from veneer.training.checkpoints import checkpoints
from veneer.training.config import DataSettings, RunConfig, explain
from veneer.training.distillation import distilling
from veneer.training.earlier import Earlier, lessons
from veneer.training.fit import Result, fit
from veneer.training.preflight import preflight
from veneer.training.progress import console, program
from veneer.training.rows import parts_of
from veneer.training.settings import DistillSettings, TrainSettings
from veneer.training.summary import header, summary

if TYPE_CHECKING:
    from datasets import Dataset

Settings = TypeVar("Settings", bound=BaseModel)

__all__ = ["Reproduction", "Result", "reproduce", "run", "train"]


def train(
    adapter: Adapter,
    data: Any,
    *,
    validation: Any = 0.1,
    task: Task | str | None = None,
    output: str | Path | None = None,
    max_truncated: float = MAX_TRUNCATED,
    distill: Mapping[str, Any] | None = None,
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
        distill: settings of distillation, e.g. ``{"teacher": "base"}``: a teacher to learn from beside the labels.
        settings: of `TrainSettings`, e.g. ``epochs=1, learning_rate=1e-4``.

    Raises:
        DataError: the data cannot be read, has errors, or doesn't suit the task.
        ConfigError: a setting is wrong.
        TrainingError: the loss is no number any more, or has run away.
        OutputError: another run is at work in ``output``, or it cannot be written.
        Interrupted: a signal asked to stop; the adapter has the weights so far.
    """
    options = _settings(settings, TrainSettings)
    teaching = _settings(distill, DistillSettings, "distill.") if distill is not None else None
    parts = parts_of(DataSettings.model_construct(train=data, validation=validation), options.seed)
    chosen = _task(adapter, task, parts[0].rows)
    header(adapter, chosen)
    checked, planned = preflight(adapter, chosen, parts, options, max_truncated=max_truncated, console=console)
    with contextlib.ExitStack() as stack:
        distillation = stack.enter_context(distilling(adapter, chosen, teaching, names_of(parts[0].rows)))
        where = Path(output or stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-")))
        stack.enter_context(folder.held(where))
        result = fit(adapter, chosen, checked, options, where, distillation=distillation)
    adapter.record = {
        "settings": options.model_dump(mode="json"),
        "distill": teaching.model_dump(mode="json") if teaching is not None else None,
        "data": {name: facts.of_rows(part.rows) for name, part in zip(("train", "validation"), parts, strict=False)},
        "versions": facts.versions(),
        "plan": planned,
        "result": asdict(result),
    }
    return result


def run(
    config: RunConfig, *, as_recorded: Mapping[str, Any] | None = None, callbacks: Sequence[Any] = ()
) -> tuple[Adapter, Result]:
    """A whole run: load base and data, attach, train, save. A run that was cut off goes on where it was.

    Args:
        config: of the run.
        as_recorded: an adapter's training record, if data and base are to be those it tells of.
        callbacks: of transformers, to watch it besides.

    Raises:
        OutputError: the output folder holds a finished run, one with another config, or one that goes on.
        DataError: the data cannot be read, or changed since the run was started.
        TrainingError: the loss is no number any more, or has run away; says how to go on.
        Interrupted: a signal asked to stop; likewise.
        VeneerError: base, data or method don't fit.
    """
    output = config.output
    with folder.held(output), contextlib.ExitStack() as stack:
        resume = folder.to_resume(output, config.plain())
        adapter, task, parts = set_up(config)
        origin = adapter.record
        distillation = stack.enter_context(distilling(adapter, task, config.distill, names_of(parts[0].rows)))
        started = {
            "data": facts.of_data(config.data, parts),
            "base": adapter.base.fingerprint,
            "continued_from": weights_hash(config.continue_from) if config.continue_from else None,
            "teacher": distillation.fingerprint if distillation is not None else None,
            "versions": facts.versions(),
        }
        if as_recorded is not None:
            folder.check_same(as_recorded, started, "this adapter was trained", "train anew with `veneer train`")
        if resume is not None:
            folder.check_unchanged(output, started)
        adapter.record = {"config": config.plain(), **started, "earlier": lessons(origin)}
        header(adapter, task)
        most = config.data.max_truncated
        checked, planned = preflight(adapter, task, parts, config.train, max_truncated=most, console=console)
        earlier = Earlier(adapter, task, lessons(origin), config.train.batch_size)
        try:
            result = fit(
                adapter,
                task,
                checked,
                config.train,
                output,
                resume=resume,
                begin=lambda: folder.start(output, config.plain(), started),
                distillation=distillation,
                callbacks=callbacks,
            )
        except TrainingError as error:
            raise TrainingError(
                f"{error} {_how_to_go_on(config, error)}", error.rows, diverged=error.diverged
            ) from error
        except Interrupted as stop:
            saved = checkpoints(output)[-1][1]
            raise Interrupted(f"{stop} Saved in {saved}; the same command goes on from there.") from None
        result = replace(result, earlier=earlier.report())
        adapter.record |= {"plan": planned, "result": asdict(result)}
        folder.finish(output, adapter, asdict(result))
    summary(adapter, result, output)
    return adapter, result


@dataclass(frozen=True)
class Reproduction:
    """What running a record again came to.

    Attributes:
        same: whether the weights are the same, bit for bit.
        recorded: hash of the weights recorded.
        found: hash of those that came out now.
        versions: what is not as it was then, or None.
    """

    same: bool
    recorded: str
    found: str
    versions: str | None


def reproduce(source: str | Path, output: str | Path) -> tuple[Adapter, Result, Reproduction]:
    """Run again what made the adapter in ``source``, into a new folder ``output``.

    Raises:
        AdapterFileError: ``source`` is no adapter folder, or doesn't say how it was made.
        DataError: the data changed since.
        VeneerError: of `run`.
    """
    record = read_record(source)
    training = record.get("training", {})
    if "config" not in training:
        raise AdapterFileError(
            f"{adapter_folder(source)} does not say how it was trained; "
            "only what `veneer train` made can be reproduced."
        )
    adapter, result = run(RunConfig.parse({**training["config"], "output": Path(output)}), as_recorded=training)
    recorded, found = weights_hash(source), weights_hash(output)
    versions = facts.changed_versions(training["versions"], facts.versions())
    return adapter, result, Reproduction(recorded == found, recorded, found, versions)


def set_up(config: RunConfig) -> tuple[Adapter, Task, list[Part]]:
    """What a run begins with: an adapter on its base, the task, training and validation rows.

    Raises:
        VeneerError: base, data or method don't fit.
    """
    parts = parts_of(config.data, config.train.seed)
    adapter, task = _continued(config, parts[0].rows) if config.continue_from else _new(config, parts[0].rows)
    return adapter, task, parts


def _new(config: RunConfig, rows: Dataset) -> tuple[Adapter, Task]:
    name = config.task.get("name") or choose_task(rows).name
    base = load_base(config.base, task=name, dtype=config.dtype, device=config.device, quantize=config.quantize)
    settings = {key: value for key, value in config.task.items() if key != "name"}
    task = _task_for(name, rows, base, settings)
    head = task.head(base, seed=config.train.seed)
    names = names_of(rows)
    method = config.method.for_tasks(names)
    adapter = base.attach(method, "adapter", modules=head, task=task.describe(), seed=config.train.seed)
    adapter.method.for_tasks(names)  # adapters that it starts from bring tasks of their own
    task = _within_positions(task, adapter, chosen="max_length" in settings)
    adapter.task = task.describe()
    return adapter, task


def _continued(config: RunConfig, rows: Dataset) -> tuple[Adapter, Task]:
    """The adapter to go on from, with its task, whose settings the config may change."""
    source = str(config.continue_from)
    read_method(source).for_tasks(names_of(rows))
    name = config.task.get("name") or read_record(source).get("task", {}).get("name")
    base = load_base(config.base, task=name, dtype=config.dtype, device=config.device, quantize=config.quantize)
    adapter = base.load(source, "adapter")
    learned = adapter_task(adapter)
    if config.task.get("name", learned.name) != learned.name:
        raise ConfigError(f"task.name: {source} was trained for {learned.name}, and goes on with that.")
    task = task_from_config({**learned.describe(), **config.task})
    adapter.task = task.describe()
    return adapter, task


def _task_for(name: str, rows: Dataset, base: Base, settings: Mapping[str, Any]) -> Task:
    try:
        return task_class(name).for_rows(rows, base, **settings)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, task_class(name), "task."))) from error


def _settings(given: Mapping[str, Any], cls: type[Settings], prefix: str = "") -> Settings:
    try:
        return cls(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, cls, prefix))) from error


def _task(adapter: Adapter, task: Task | str | None, rows: Dataset) -> Task:
    """The task to train for; gives the adapter its head if it has none yet."""
    if task is None and adapter.task:
        return task_from_config(adapter.task)
    chosen = isinstance(task, Task)
    if not isinstance(task, Task):
        task = (task_class(task) if task else choose_task(rows)).for_rows(rows, adapter.base)
    task = _within_positions(task, adapter, chosen=chosen)
    adapter.base.train_in_full(adapter, task.head(adapter.base, seed=0))
    adapter.task = task.describe()
    return task


def _within_positions(task: Task, adapter: Adapter, *, chosen: bool) -> Task:
    """The task with inputs short enough to leave the adapter the positions it takes for itself.

    Args:
        task: what to train for.
        adapter: what will be trained.
        chosen: whether the user has said how long they may be.

    Raises:
        ConfigError: too long a length was chosen, or none is short enough.
    """
    there, taken = adapter.base.sites.learned_positions, adapter.positions
    if there is None or not taken or task.max_length <= there - taken:
        return task
    if chosen or there - taken < 2:
        raise ConfigError(
            f"task.max_length: {task.max_length} tokens and the {taken} positions {adapter.method.name} takes are more "
            f"than the {there} that {adapter.base.name} has; at most {max(there - taken, 0)} are left for the text."
        )
    return task.model_copy(update={"max_length": there - taken})


def _how_to_go_on(config: RunConfig, error: TrainingError) -> str:
    usual = config.method.learning_rate
    rate = min((config.train.learning_rate or usual) / 10, usual)
    again, other = (
        f"{program()} train {config.output / folder.CONFIG}",
        f"train.learning_rate={rate:.0e} output=ANOTHER",
    )
    found = checkpoints(config.output)
    if not found:
        return f"Nothing had been saved yet. To start again with other settings: {again} {other}"
    if error.diverged:  # what was saved shortly before is as like as not spoilt
        return f"To start again with a lower one ({config.method.name}'s usual is {usual:g}): {again} {other}"
    step, last = found[-1]
    return (
        f"The last good checkpoint, of step {step}, is kept. To go on from it with other settings: "
        f"{again} --continue {last} {other}"
    )
