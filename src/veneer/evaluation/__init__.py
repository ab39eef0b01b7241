"""Proof: held-out metrics with intervals, the plain base beside the adapter, and predictions to files."""

from veneer.evaluation.answers import predict, predict_file
from veneer.evaluation.held_out import Report, Score, evaluate
from veneer.evaluation.intervals import wilson

__all__ = ["Report", "Score", "evaluate", "predict", "predict_file", "wilson"]
