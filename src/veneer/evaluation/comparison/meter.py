"""Time and energy of the optimiser steps alone, without validations between them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import transformers

_RAPL = Path("/sys/class/powercap")


class Meter(transformers.TrainerCallback):
    """Counts seconds, processor seconds and, where the machine tells (RAPL), joules inside optimiser steps.

    Attributes:
        seconds: of the steps.
        cpu_seconds: this process spent in them, on all processors.
        joules: the processors' packages took meanwhile, other processes' share included; None where nothing tells.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._packages = [path for path in sorted(_RAPL.glob("intel-rapl:?")) if os.access(path / "energy_uj", os.R_OK)]
        self.joules: float | None = 0.0 if self._packages else None
        self._began: tuple[float, float, list[int]] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._began = time.perf_counter(), time.process_time(), self._microjoules()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if self._began is None:
            return
        seconds, cpu, energy = self._began
        self.seconds += time.perf_counter() - seconds
        self.cpu_seconds += time.process_time() - cpu
        if self.joules is not None:
            for path, before, now in zip(self._packages, energy, self._microjoules(), strict=True):
                most = int((path / "max_energy_range_uj").read_text()) if now < before else 0  # it has wrapped around
                self.joules += (now - before + most) / 1e6
        self._began = None

    def _microjoules(self) -> list[int]:
        return [int((path / "energy_uj").read_text()) for path in self._packages]
