"""Training: settings, the loop (a transformers Trainer underneath), progress, and whole runs from a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy

__all__ = ["Result", "RunConfig", "TrainSettings", "Trainer", "find_learning_rate", "reproduce", "run", "train"]

# transformers' Trainer takes seconds to import; a mistake in a config is told before that.
__getattr__ = lazy(
    __name__,
    {
        "Result": "veneer.training.fit",
        "RunConfig": "veneer.training.config",
        "TrainSettings": "veneer.training.settings",
        "Trainer": "veneer.training.trainer",
        "find_learning_rate": "veneer.training.lr_find",
        "reproduce": "veneer.training.runs",
        "run": "veneer.training.runs",
        "train": "veneer.training.runs",
    },
)

if TYPE_CHECKING:
    from veneer.training.config import RunConfig as RunConfig
    from veneer.training.fit import Result as Result
    from veneer.training.lr_find import find_learning_rate as find_learning_rate
    from veneer.training.runs import reproduce as reproduce
    from veneer.training.runs import run as run
    from veneer.training.runs import train as train
    from veneer.training.settings import TrainSettings as TrainSettings
    from veneer.training.trainer import Trainer as Trainer
