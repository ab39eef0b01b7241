"""What is to be compared, from YAML and ``key=value`` overrides; all mistakes in it are told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import ConfigError
from veneer.methods import methods
from veneer.methods.registry import DEFAULT
from veneer.training.config import DataSettings, RunConfig, explain, read_values
from veneer.training.settings import TrainSettings

Source = str | dict[str, Any] | list[str | dict[str, Any]]
_OF_A_RUN = ("base", "method", "task", "train", "distill", "dtype", "quantize", "device")
"""Keys of a run that an entry may have of its own."""
_MERGED = ("task", "train", "distill")


class CompareData(DataSettings):
    """Which data to learn from, to validate on, and to be scored on."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    test: Source
    """Held-out rows every run is scored on: a file, hub id or catalogue name. Rows that occur in the training data are
    left out."""
    test_split: str = "test"
    """Split of a hub or catalogue data set to be scored on."""
    out_of_domain: dict[str, Source] = Field(default_factory=dict)
    """Further held-out rows, by name, that differ from the training data in kind: is what was learned good for them?"""
    test_limit: int | None = Field(None, ge=1)
    """Score on a random choice of this many rows, of each."""


class SearchSettings(BaseModel):
    """A small search for each entry's learning rate."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.3, 1.0, 3.0]
    """Times the rate an entry would take; the lowest validation loss wins. One run each, of the first seed."""


class SizeSettings(BaseModel):
    """Learning curves over the number of training rows."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rows: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    """Train on a random choice of so many rows, too; another for each seed, the same for all entries."""
    train: dict[str, Any] = {}
    """Settings of these runs that differ from `train`, e.g. {epochs: 10}. They end with their last weights: with
    so few rows there are none to choose the best by."""


class CompareConfig(BaseModel):
    """Everything a comparison needs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    SECTIONS: ClassVar[Mapping[str, type[BaseModel]]] = {
        "data": CompareData,
        "train": TrainSettings,
        "search": SearchSettings,
        "sizes": SizeSettings,
    }

    entries: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """What to compare: names of methods; methods with settings ({name: lora, rank: 4}); or mappings with a `label` and
    any of base, method, task, train, distill, dtype, quantize, device that differ from those below."""
    data: CompareData
    """Which data."""
    output: Path
    """Folder of the results."""
    base: str | None = None
    """The base of all entries that name none."""
    task: dict[str, Any] = {}
    """The task's name and settings."""
    train: dict[str, Any] = {}
    """How to train; a learning rate here would be that of all entries."""
    distill: dict[str, Any] | None = None
    """Learn from a teacher, too."""
    dtype: str = "auto"
    """Of the bases."""
    quantize: str | None = None
    """Of the bases: nf4 or int8."""
    device: str | None = None
    """Of the bases."""
    baselines: bool = True
    """Compare with the plain base, with training the task's head alone (where it has one) and with training the whole
    base, too."""
    seeds: int = Field(3, ge=1, le=100)
    """Runs of each entry. A seed is that of the head, the method's start, the order of rows and the choice of them."""
    metric: str | None = None
    """What quality is: by default accuracy, or the loss of language models. Also token_accuracy; exact_match and
    json_match generate every answer."""
    search: SearchSettings | None = None
    """Search each entry's learning rate first; by default it takes its own, or the method's."""
    sizes: SizeSettings | None = None
    """Learning curves over the number of training rows; by default none."""
    forgetting: bool = True
    """Measure what each run forgot, at the end and at each validation."""
    retention: list[str] = []
    """Files of your own to measure forgetting on, besides the shipped set."""
    power: float | None = Field(None, gt=0)
    """Watts this machine draws under load, to estimate energy from time where it can't be measured."""


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        label: what it is called.
        config: of its runs, but for seed and output.
    """

    label: str
    config: RunConfig


def read_compare_config(file: Path | None, overrides: Sequence[str], **given: Any) -> tuple[CompareConfig, list[Entry]]:
    """A comparison from a YAML file (or none), ``key=value`` overrides, and values given besides unless None.

    Raises:
        ConfigError: the file cannot be read, or anything is wrong in it; the message lists everything.
    """
    values = read_values(file, overrides, **given)
    if isinstance(values.get("task"), str):
        values["task"] = {"name": values["task"]}
    try:
        config = CompareConfig(**values)
    except ValidationError as error:
        lines = [*explain(error, CompareConfig), *_of_entries(values, error)]
        raise ConfigError("The config has mistakes:\n" + "\n".join(f"  - {line}" for line in lines)) from error
    return config, _entries(config)


def _of_entries(values: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Mistakes of the entries beside those of other keys, which are left out, or stood in for, to find them."""
    wrong = {str(mistake["loc"][0]) for mistake in error.errors() if mistake["loc"]}
    sound = {key: value for key, value in values.items() if key not in wrong}
    needed: dict[str, Any] = {"data": {"train": "", "test": ""}, "output": ".", "base": ""}
    try:
        _entries(CompareConfig(**{**{key: needed[key] for key in needed if key not in sound}, **sound}))
    except ValidationError:
        return []  # of the entries themselves
    except ConfigError as mistakes:
        return [line.removeprefix("  - ") for line in str(mistakes).splitlines()[1:]]
    return []


def _entries(config: CompareConfig) -> list[Entry]:
    raw = [_named(entry) for entry in config.entries]
    asked = {_method_name(entry) for entry in raw}
    if config.baselines:
        raw += [_named(name) for name, cls in methods().items() if cls.baseline == "whole" and name not in asked]
    problems: dict[str, None] = {}
    found: list[Entry] = []
    for place, entry in enumerate(raw, 1):
        where = f"entries, {place}. ({entry['label']})" if place <= len(config.entries) else entry["label"]
        try:
            found.append(Entry(entry["label"], run_config(config, entry)))
        except ConfigError as error:
            told = str(error).splitlines()
            problems |= dict.fromkeys(f"{where}: {line.removeprefix('  - ')}" for line in told[1:] or told)
    labels = [entry["label"] for entry in raw]
    for label in {label for label in labels if labels.count(label) > 1}:
        problems[f"entries: two are called {label!r}; give one of them another `label`"] = None
    if problems:
        raise ConfigError("The config has mistakes:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def head_baselines(config: CompareConfig, entries: Sequence[Entry]) -> list[Entry]:
    """Training the head alone, for tasks that have one, unless that is among the entries or not wanted."""
    asked = {entry.config.method.name for entry in entries}
    names = [name for name, cls in methods().items() if cls.baseline == "head" and name not in asked]
    return [Entry(name, run_config(config, _named(name))) for name in names if config.baselines]


def run_config(config: CompareConfig, entry: Mapping[str, Any]) -> RunConfig:
    """The config of an entry's runs.

    Raises:
        ConfigError: anything is wrong with it.
    """
    common = {key: getattr(config, key) for key in _OF_A_RUN if key != "method"}
    own = {key: value for key, value in entry.items() if key != "label"}
    if unknown := [key for key in own if key not in _OF_A_RUN]:
        raise ConfigError(f"{', '.join(unknown)}: an entry has no such key; it has label, {', '.join(_OF_A_RUN)}")
    merged = {**common, **own}
    for key in _MERGED:
        if isinstance(own.get(key), Mapping):
            merged[key] = {**(common[key] or {}), **own[key]}
    if merged["base"] is None:
        raise ConfigError("base: is missing")
    merged["train"] = {"samples": 0, **merged["train"]}
    data = {key: getattr(config.data, key) for key in DataSettings.model_fields}
    return RunConfig.parse({**merged, "data": data, "output": config.output})


def _named(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """An entry as a mapping with a label."""
    if isinstance(entry, str):
        return {"label": entry, "method": entry}
    if "name" in entry:  # a method with settings
        settings = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("name", "label"))
        method = {key: value for key, value in entry.items() if key != "label"}
        return {"label": entry.get("label") or f"{entry['name']}{', ' if settings else ''}{settings}", "method": method}
    return {"label": _method_name(entry), **entry}


def _method_name(entry: Mapping[str, Any]) -> str:
    method = entry.get("method", DEFAULT)
    return str(method.get("name", "")) if isinstance(method, Mapping) else str(method)
