"""What a run tells while it goes: lines on the terminal, a JSONL log, sample answers."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console

from veneer.storage import write_text
from veneer.tasks import Task

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress goes to stderr; stdout is for results."""


def peak_memory() -> int:
    """The most bytes this process has held so far (on the GPU, where there is one)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(count: float) -> str:
    """Bytes for people: ``19.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def program() -> str:
    """How to call this command again: ``veneer`` if that is found, else the path it was called by."""
    called = Path(sys.argv[0])
    if called.name != "veneer" or shutil.which("veneer"):
        return "veneer"
    return os.path.relpath(called)


def duration(seconds: float) -> str:
    """Seconds for people: ``2:07`` or ``1:02:07``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(transformers.TrainerCallback):
    """Prints a line at each log and each validation, and appends both to ``log.jsonl``.

    Args:
        log: the file.
        seen: tokens the run has met by now, and places it computed, padding among them.
        resumed_at: the step that an interrupted run goes on from.
    """

    def __init__(self, log: Path, seen: Callable[[], tuple[int, int]], resumed_at: int | None = None) -> None:
        self.log = log
        self._seen = seen
        self.history = _entries(log, resumed_at) if resumed_at is not None else []
        before: Mapping[str, Any] = next((entry for entry in reversed(self.history) if "tokens" in entry), {})
        self._tokens_before = before.get("tokens", 0)
        self._places_before = before.get("places", self._tokens_before)
        self._seconds_before = before.get("seconds", 0.0)
        if resumed_at is not None:
            write_text(log, "".join(json.dumps(entry) + "\n" for entry in self.history))
        self._started = self._began = time.perf_counter()
        self._steps = self._timed = 0
        self._spent, self._met, self._met_before = 0.0, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._began, self._met_before = time.perf_counter(), self._seen()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it. The first step pays for warming up, too: it counts only as long as it is the only one."""
        self._steps += 1
        if self._steps == 2:
            self._spent, self._met, self._timed = 0.0, 0, 0
        self._spent += time.perf_counter() - self._began
        self._met += self._seen()[0] - self._met_before
        self._timed += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Record what is logged, and print it."""
        entry = {"step": state.global_step, **(logs or {})}
        if "train_runtime" in entry:
            return
        if "eval_loss" in entry:
            console.print(f"[bold]{self._validation(entry)}[/bold]")
        elif "loss" in entry:
            entry["tokens_per_second"] = round(self._met / max(self._spent, 1e-9), 1)
            entry["peak_memory"] = peak_memory()
            entry["tokens"], entry["places"] = self.tokens, self.places
            entry["seconds"] = round(self.seconds, 3)
            console.print(self._step(entry, state))
        self.history.append(entry)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def tokens(self) -> int:
        """Seen so far, before an interruption too (as far as it was logged)."""
        return self._tokens_before + self._seen()[0]

    @property
    def places(self) -> int:
        """Computed so far, padding among them; likewise."""
        return self._places_before + self._seen()[1]

    @property
    def seconds(self) -> float:
        """Trained so far, likewise."""
        return self._seconds_before + time.perf_counter() - self._started

    def _step(self, entry: Mapping[str, Any], state: Any) -> str:
        left = self._spent / max(self._timed, 1) * (state.max_steps - state.global_step)
        width = len(str(state.max_steps))
        penalty = f"penalty {entry['penalty']:.4f}  " if "penalty" in entry else ""
        return (
            f"step {state.global_step:>{width}}/{state.max_steps}  loss {entry['loss']:.4f}  {penalty}"
            f"lr {entry.get('learning_rate', 0):.1e}  {entry['tokens_per_second']:,.0f} tokens/s  "
            f"{duration(left)} left  {size(entry['peak_memory'])}"
        )

    @staticmethod
    def _validation(entry: Mapping[str, Any]) -> str:
        skip = {"eval_runtime", "step", "epoch"}
        shown = [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in entry.items() if name not in skip]
        return f"validation at step {entry['step']}  " + "  ".join(shown)


def _entries(log: Path, upto: int) -> list[dict[str, Any]]:
    """What an interrupted run logged up to the step it goes on from."""
    if not log.exists():
        return []
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [entry for entry in entries if entry["step"] <= upto]


class Samples(transformers.TrainerCallback):
    """Shows what the adapter answers to a few validation rows, at each validation."""

    def __init__(self, adapter: Any, task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
        self.adapter, self.task = adapter, task
        self.rows = [task.sample(row) for row in rows]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer, and print question, expected and given answer."""
        self.adapter.eval()
        answers = self.task.predict(self.adapter, self.adapter.base, self.rows, batch_size=len(self.rows))
        for row, answer in zip(self.rows, answers, strict=True):
            question, expected, given = self.task.show(row, answer)
            console.print(f"   [dim]{_short(question)}[/dim]", markup=True)
            console.print(
                f"   → {_short(given)}", f"   (expected {_short(expected)})" if expected else "", markup=False
            )


def _short(text: str, most: int = 100) -> str:
    line = " ".join(text.split()).replace("[", "\\[")
    return line if len(line) <= most else line[: most - 1] + "…"
