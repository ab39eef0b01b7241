"""Training: settings, the loop (a transformers Trainer underneath), progress, and whole runs from a config."""

from veneer.training.config import RunConfig
from veneer.training.run import Result, run, train
from veneer.training.settings import TrainSettings
from veneer.training.trainer import Trainer

__all__ = ["Result", "RunConfig", "TrainSettings", "Trainer", "run", "train"]
