"""Stopping in good order: the first Ctrl-C or SIGTERM ends the step under way, a second one ends everything."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import transformers

_TOLD = (
    b"\nStopping after this step, and saving; once more stops at once, losing what came after the last checkpoint.\n"
)


class Interruption(transformers.TrainerCallback):
    """While entered, a signal has the trainer finish its step, save a checkpoint and return.

    Attributes:
        asked: whether a signal came.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, _TOLD)  # print() may be what was interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True
