"""PEFT methods, one a file: which sites, which parameters, and how they lower to deltas."""

from veneer.methods.base import BaseWeights, Course, Lowering, Method, Survey
from veneer.methods.registry import method_class, method_from_config, methods

__all__ = ["BaseWeights", "Course", "Lowering", "Method", "Survey", "method_class", "method_from_config", "methods"]
