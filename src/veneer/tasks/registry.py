"""Tasks by name, and the one a data set asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from veneer.data import detect
from veneer.errors import ConfigError, UnknownName, did_you_mean
from veneer.tasks.base import Task
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.sequence_classification import SequenceClassification

if TYPE_CHECKING:
    from datasets import Dataset

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (CausalLM, SequenceClassification)}


def task_class(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in TASKS:
        raise UnknownName(f"No task called {name!r}.{did_you_mean(name, TASKS)} There are: {', '.join(TASKS)}.")
    return TASKS[name]


def choose_task(rows: Dataset) -> type[Task]:
    """The first task that takes rows of this format."""
    format = detect(rows.column_names)
    return next(task for task in TASKS.values() if format in task.formats)


def task_from_config(config: Mapping[str, Any]) -> Task:
    """A task from what an adapter's files say of it (`Task.describe`).

    Raises:
        UnknownName: there is no such task.
        ConfigError: its settings cannot be.
    """
    fields = {key: value for key, value in config.items() if key not in {"name", "peft_task_type"}}
    cls = task_class(str(config.get("name")))
    try:
        return cls(**fields)
    except ValidationError as error:
        wrong = [
            f"task.{'.'.join(map(str, each['loc']))}: {each['msg']} (got {each['input']!r})" for each in error.errors()
        ]
        raise ConfigError("; ".join(wrong)) from error
