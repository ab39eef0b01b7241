"""Carries out what a method does in the course of a run, without knowing which method it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.adapters import Adapter
from veneer.methods import Course

STATE = "course.safetensors"
"""What a checkpoint keeps of it."""


class Conduct(transformers.TrainerCallback):
    """Calls the method's `Course` around each optimiser step.

    Args:
        adapter: what is trained.
        resume: the checkpoint the run goes on from, if it does.
    """

    def __init__(self, adapter: Adapter, resume: Path | None) -> None:
        self.adapter, self.resume = adapter, resume
        self.course: Course | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on."""
        parameters = {site.path: self.adapter.parameters_at(site.path) for site in self.adapter.sites}
        self.course = self.adapter.method.course(parameters, state.max_steps)
        if self.course is not None and self.resume is not None and (state := self.course.state()):
            kept = load_file(self.resume / STATE)
            for name, value in state.items():
                value.copy_(kept[name])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there."""
        if self.course is not None:
            self.course.before_step(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The parameters have moved."""
        if self.course is not None:
            self.course.after_step(state.global_step + 1)

    @property
    def final_from(self) -> int:
        """The first step whose weights may be kept as the best."""
        return self.course.final_from() if self.course is not None else 0

    def penalty(self) -> Tensor | None:
        """To be added to a step's mean loss."""
        return self.course.penalty() if self.course is not None else None

    def save(self, folder: Path) -> None:
        """Keep what it has gathered beside a checkpoint's other files."""
        if self.course is not None and (state := self.course.state()):
            save_file({name: value.contiguous() for name, value in state.items()}, folder / STATE)
