"""Tasks, one a file: head, features, collation, loss, metrics, predictions."""

from veneer.tasks.base import Outcome, Prepared, Task
from veneer.tasks.checking import Checked, check_data
from veneer.tasks.loading import adapter_task, load_adapter, load_base, load_base_for
from veneer.tasks.registry import TASKS, choose_task, task_class, task_from_config

__all__ = [
    "TASKS",
    "Checked",
    "Outcome",
    "Prepared",
    "Task",
    "adapter_task",
    "check_data",
    "choose_task",
    "load_adapter",
    "load_base",
    "load_base_for",
    "task_class",
    "task_from_config",
]
