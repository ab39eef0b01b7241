"""Tasks, one a file: head, features, collation, loss, metrics, predictions."""

from veneer.tasks.base import Outcome, Prepared, Task
from veneer.tasks.loading import adapter_task, load_adapter, load_base, load_base_for
from veneer.tasks.registry import TASKS, choose_task, task_class, task_from_config

__all__ = [
    "TASKS",
    "Outcome",
    "Prepared",
    "Task",
    "adapter_task",
    "choose_task",
    "load_adapter",
    "load_base",
    "load_base_for",
    "task_class",
    "task_from_config",
]
