"""The data of a comparison: read and checked before the first run, and held against what earlier runs saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from veneer.data import read
from veneer.data.hashes import hash_files
from veneer.errors import ConfigError, DataError
from veneer.evaluation import retention
from veneer.evaluation.comparison.config import CompareConfig, Entry
from veneer.evaluation.comparison.schedule import IN_DOMAIN, RETENTION, TRAIN, VALIDATION, further
from veneer.tasks import Task, choose_task, task_class
from veneer.training.config import DataSettings
from veneer.training.facts import of_rows

if TYPE_CHECKING:
    from datasets import Dataset

MEASURED = ("loss", "accuracy", "token_accuracy")
"""Metrics that need no answers to be generated."""


def checked(config: CompareConfig, entries: Sequence[Entry]) -> dict[str, Any]:
    """Rows and hashes of all data, by what they are used for. Hours of training should not end in a file that can't
    be read.

    Raises:
        DataError: something cannot be read, or is not for the task of an entry.
        ConfigError: all rows to be scored on occur in the training data, or don't give the metric.
        FetchError: something cannot be had.
    """
    data = config.data
    rows = {TRAIN: _read("data.train", data.train, data.split, data)}
    sources: dict[str, tuple[Any, str]] = {TRAIN: (data.train, data.split)}
    if not isinstance(data.validation, float | int):
        sources[VALIDATION] = (data.validation, data.validation_split)
        rows[VALIDATION] = _read("data.validation", data.validation, data.validation_split, data)
    tasks = [_task(settings, rows[TRAIN]) for settings in _distinct(entry.config.task for entry in entries)]
    for name, source in {IN_DOMAIN: data.test, **data.out_of_domain}.items():
        key = "data.test" if name == IN_DOMAIN else f"data.out_of_domain.{name}"
        part = name if name == IN_DOMAIN else further(name)
        sources[part] = (source, data.test_split)
        rows[part] = _read(key, source, data.test_split, data)
        for task in tasks:
            _suits(key, source, task, rows[part])
            others = unseen(rows[part], source, task, known(task, rows[TRAIN]), key)
            _gives(config.metric, key, source, task, others)
    facts = {
        part: {**of_rows(rows[part]), "files": hash_files(source, split)} for part, (source, split) in sources.items()
    }
    own = retention.own(config.retention) if config.forgetting else {}
    for path, kept in zip(config.retention, own.values(), strict=False):
        facts[f"{RETENTION}{path}"] = {**of_rows(kept), "files": hash_files(path, "train")}
    return facts


def known(task: Task | type[Task], rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """What is asked in the training data, all of them, whether a run's seed takes them or not."""
    return {_question(task, row) for row in rows}


def unseen(rows: Dataset, source: Any, task: Task | type[Task], known: set[str], key: str = "data.test") -> Dataset:
    """The rows that are not among the training data.

    Raises:
        ConfigError: there are none.
    """
    left = [index for index, row in enumerate(rows) if _question(task, row) not in known]
    if not left:
        raise ConfigError(f"{key}: all rows of {source} occur in the training data; give others.")
    return rows.select(left)


def _distinct(settings: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for each in settings:
        if each not in found:
            found.append(each)
    return found


def _task(settings: Mapping[str, Any], rows: Dataset) -> Task | type[Task]:
    """With the labels of the training data; as a class where the settings are wrong, which its runs tell."""
    cls = task_class(settings["name"]) if "name" in settings else choose_task(rows)
    try:
        return cls.for_rows(rows, None, **{key: value for key, value in settings.items() if key != "name"})
    except ValidationError:
        return cls


def _suits(key: str, source: Any, task: Task | type[Task], rows: Dataset) -> None:
    try:
        task.check_format(rows)
    except DataError as error:
        raise DataError(f"{key}: {source}: {error}") from error
    if isinstance(task, Task) and (unknown := task.unknown_labels(rows)):
        labels = ", ".join(sorted(set(unknown.values()))[:5])
        raise DataError(f"{key}: {source} has labels that the training data don't have: {labels}.")


def _gives(metric: str | None, key: str, source: Any, task: Task | type[Task], rows: Dataset) -> None:
    if metric is None or not isinstance(task, Task):
        return
    given = (*MEASURED, *task.commonest(list(rows)))
    if metric not in given:
        raise ConfigError(f"metric: {metric}: rows of {key}, {source}, give {', '.join(dict.fromkeys(given))}.")


def _read(key: str, source: Any, split: str, data: DataSettings) -> Dataset:
    try:
        return read(source, split=split, columns=data.columns)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _question(task: Task | type[Task], row: Mapping[str, Any]) -> str:
    asked = next((row[column] for column in task.asks_from if row.get(column) is not None), "")
    return " ".join(str(asked).lower().split())
