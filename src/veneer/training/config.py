"""One typed config for a run, from YAML and ``key=value`` overrides; all mistakes in it are told at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, field_validator

from veneer.bases.quantized import Kind
from veneer.data.report import MAX_TRUNCATED
from veneer.errors import ConfigError, UnknownName, did_you_mean
from veneer.methods import Method, method_from_config, methods
from veneer.methods.registry import DEFAULT
from veneer.mistakes import mistakes
from veneer.tasks import TASKS
from veneer.training.settings import DistillSettings, TrainSettings

_ELSEWHERE: Mapping[str, str] = {
    # transformers' and others' spellings of what stands under `train:` (the method's own: see `Method.peft_names`)
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "train.checkpointing",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "eval_steps": "train.evaluate_every",
    "save_steps": "train.checkpoint_every",
    "early_stopping_patience": "train.patience",
    "logging_steps": "train.log_every",
    "report_to": "train.trackers",
    "group_by_length": "train.group_by_length",
    "output_dir": "output",
    "model": "base",
    "model_name_or_path": "base",
    "base_model": "base",
    "dataset": "data.train",
    "train_file": "data.train",
    "max_seq_length": "task.max_length",
    "cutoff_len": "task.max_length",
    "load_in_4bit": "quantize (nf4)",
    "load_in_8bit": "quantize (int8)",
    "quantization": "quantize",
    "adapter": "method",
    "peft": "method",
}


Share = Annotated[float, Field(ge=0, lt=1)]


class DataSettings(BaseModel):
    """Which data to learn from and to validate on."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: str | dict[str, Any] | list[str | dict[str, Any]]
    """A file, folder, hub id or catalogue name; or a list of them, each as {path, task, split, columns} if need be."""
    validation: Share | str | dict[str, Any] | list[str | dict[str, Any]] = 0.1
    """The same, or a share of the training rows to hold out; 0 for none."""
    split: str = "train"
    """Split of a hub or catalogue data set to train on."""
    validation_split: str = "validation"
    """Split of a hub or catalogue data set to validate on."""
    columns: dict[str, str] | None = None
    """Our name of a column: its name in the data, e.g. {prompt: question, completion: answer}."""
    limit: int | None = Field(None, ge=1)
    """Train on a random choice of this many rows."""
    validation_limit: int | None = Field(None, ge=1)
    """Validate on a random choice of this many rows."""
    max_truncated: float = Field(MAX_TRUNCATED, ge=0, le=1)
    """Share of the rows that may be cut at task.max_length, or left out because of it; more is an error."""

    @field_validator("validation", mode="before")
    @classmethod
    def _zero_for_none(cls, validation: Any) -> Any:
        if validation in (None, "none", "None", "null"):
            raise ValueError("should be 0 for none")
        return validation


class RunConfig(BaseModel):
    """Everything a training run needs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    SECTIONS: ClassVar[Mapping[str, type[BaseModel]]] = {
        "data": DataSettings,
        "train": TrainSettings,
        "distill": DistillSettings,
    }

    base: str
    """A hub id, folder, .gguf file, or catalogue name (`veneer models`)."""
    data: DataSettings
    """Which data."""
    output: Path
    """Folder of the run; the adapter goes to its folder `adapter`."""
    continue_from: str | None = None
    """An adapter to go on training, instead of a new one: its folder. Base, method and task are then its own."""
    method: InstanceOf[Method]
    """What to train, e.g. {name: lora, rank: 16}; see `veneer methods`."""
    task: dict[str, Any] = {}
    """The task's name and settings; by default what the data's columns ask for."""
    train: TrainSettings = TrainSettings()
    """How to train."""
    distill: DistillSettings | None = None
    """Learn from a teacher, too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base: auto, float32, bfloat16, float16."""
    quantize: Kind | None = None
    """Keep the base's linear maps in few bits (QLoRA): nf4 (4.1 bits a weight) or int8 (8 bits)."""
    device: str | None = None
    """Of the base: cuda, mps, cpu; by default the first there is."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> RunConfig:
        """A config from plain values.

        Raises:
            ConfigError: anything is wrong with it; the message lists everything.
        """
        values = dict(raw)
        problems: list[str] = []
        if values.get("continue_from"):
            own = _of_adapter(str(values["continue_from"]))
            if "method" in values and method_from_config(values["method"]) != own["method"]:
                problems.append("method: is that of the adapter it continues from; leave it out")
            values = own | values | {"method": own["method"]}
        values["method"], wrong = _parse_method(values.get("method", DEFAULT), new=not values.get("continue_from"))
        problems += wrong
        if isinstance(values.get("task"), str):
            values["task"] = {"name": values["task"]}
        if isinstance(values.get("task"), Mapping):
            problems += _task_problems(values["task"])
        try:
            config = cls(**values)
        except ValidationError as error:
            problems += explain(error, cls)
        if problems:
            raise ConfigError("The config has mistakes:\n" + "\n".join(f"  - {problem}" for problem in problems))
        return config

    def plain(self) -> dict[str, Any]:
        """As plain values that `parse` takes back."""
        values = self.model_dump(mode="json", exclude={"method"})
        return {**values, "method": {"name": self.method.name, **self.method.model_dump(mode="json")}}


def read_config(
    file: Path | None, overrides: Sequence[str], *, defaults: Mapping[str, Any] | None = None, **given: Any
) -> RunConfig:
    """A config from a YAML file (or none), ``key=value`` overrides, and values given besides unless None.

    Args:
        file: the YAML file.
        overrides: ``key=value``, later ones win.
        defaults: values of keys that none of them gives.
        given: values that go before all of them.

    Raises:
        ConfigError: the file cannot be read, or anything is wrong in either.
    """
    return RunConfig.parse({**(defaults or {}), **read_values(file, overrides, **given)})


def read_values(file: Path | None, overrides: Sequence[str], **given: Any) -> dict[str, Any]:
    """What `read_config` reads, as plain values that nothing is checked of yet.

    Raises:
        ConfigError: the file cannot be read, or an override is none.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the config {file}: {error.strerror or error}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is no YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file} holds no keys; a config is a mapping such as `base: smollm2-135m-instruct`.")
        values = loaded
    for override in overrides:
        _override(values, override)
    return {**values, **{key: value for key, value in given.items() if value is not None}}


_SLICE = re.compile(r"-?\d*:(-?\d+)?")


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override; write key=value, e.g. train.learning_rate=1e-4.")
    *parents, leaf = key.split(".")
    node = values
    if key == "method.name":
        values["method"] = {}  # another method has other settings
    for parent in parents:
        inner = node.get(parent)
        if isinstance(inner, str) and parent in {"method", "task"}:
            inner = {"name": inner}
        if inner is None:
            inner = {"name": DEFAULT} if parent == "method" else {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {parent!r} is {inner!r}, which has no keys.")
        node[parent] = inner
        node = inner
    if _SLICE.fullmatch(text):  # YAML takes -4: for a mapping, and 1:30 for ninety
        node[leaf] = text
        return
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is no YAML: {error}") from error


def _of_adapter(folder: str) -> dict[str, Any]:
    """What a config takes from the adapter it continues from.

    Raises:
        AdapterFileError: there is none.
    """
    from veneer.adapters.files import base_name, read_method, read_record

    quantized = read_record(folder).get("base", {}).get("quantized")
    return {"base": base_name(folder), "method": read_method(folder), "quantize": quantized}


def _parse_method(raw: Any, *, new: bool) -> tuple[Method | None, list[str]]:
    if not isinstance(raw, str | Mapping | Method):
        return None, [f"method: {raw!r} is neither a name nor a mapping with one"]
    try:
        method = method_from_config(raw)
        if new:
            method.check_new()
        return method, []
    except UnknownName as error:
        return None, [f"method: {error}"]
    except ConfigError as error:
        return None, str(error).split("; ")


def _task_problems(raw: Mapping[str, Any]) -> list[str]:
    name = raw.get("name")
    if name is not None and name not in TASKS:
        return [f"task.name: {name!r} is no task.{did_you_mean(str(name), TASKS)} There are: {', '.join(TASKS)}"]
    classes = [TASKS[name]] if name else list(TASKS.values())
    known = {field for task in classes for field in task.model_fields} | {"name"}
    return [f"task.{key}: unknown key.{did_you_mean(key, known)}" for key in raw if key not in known]


def explain(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> list[str]:
    """What is wrong, a line each, with the nearest known key for an unknown one."""
    sections: Mapping[str, type[BaseModel]] = getattr(cls, "SECTIONS", {})
    lines = []
    for mistake in mistakes(error, lambda loc: 2 if loc and loc[0] in sections else 1):
        path = [str(part) for part in mistake.path]
        if path == ["method"]:
            continue  # told already, with more detail
        where = prefix + ".".join(path)
        if mistake.kind == "extra_forbidden":
            lines.append(f"{where}: unknown key.{_nearest(path, cls)}")
        elif mistake.kind == "model_type" and (section := sections.get(where)):
            such = mistake.given if isinstance(mistake.given, str | int) else "…"
            like = f", such as {where}.{next(iter(section.model_fields))}={such}"
            lines.append(f"{where}: {mistake.what.replace('a mapping', 'a mapping' + like, 1)}")
        else:
            lines.append(f"{where}: {mistake.what}")
    return lines


def _known(cls: type[BaseModel]) -> str:
    return f" Known: {', '.join(cls.model_fields)}." if cls.model_fields else " It has no settings."


def _nearest(path: Sequence[str], cls: type[BaseModel]) -> str:
    wrong = path[-1]
    if wrong in _ELSEWHERE:
        return f" It is called {_ELSEWHERE[wrong]} here."
    for method in methods().values():
        if wrong in method.peft_names:
            return f" It is called method.{method.peft_names[wrong]} here."
    sections: Mapping[str, type[BaseModel]] = getattr(cls, "SECTIONS", RunConfig.SECTIONS)
    for part in path[:-1]:
        cls = sections.get(part, cls)
    hint = did_you_mean(wrong, cls.model_fields)
    homes = [name for name, section in sections.items() if wrong in section.model_fields]
    return hint or (f" Did you mean {homes[0]}.{wrong}?" if homes else _known(cls))
