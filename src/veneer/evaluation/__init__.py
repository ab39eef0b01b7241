"""Proof: held-out metrics with intervals, the plain base beside the adapter, and predictions to files."""

from veneer.evaluation.answers import predict, predict_file
from veneer.evaluation.forgetting import Change, Forgetting, forgetting
from veneer.evaluation.held_out import Report, evaluate
from veneer.evaluation.intervals import wilson
from veneer.evaluation.scores import Score

__all__ = [
    "Change",
    "Forgetting",
    "Report",
    "Score",
    "evaluate",
    "forgetting",
    "predict",
    "predict_file",
    "wilson",
]
