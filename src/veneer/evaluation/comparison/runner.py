"""Runs the processes of a comparison, some at a time, and goes on where it was after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from veneer.errors import Interrupted
from veneer.evaluation.comparison.config import CompareConfig, Entry, head_baselines
from veneer.evaluation.comparison.data import checked
from veneer.evaluation.comparison.schedule import OUTPUT, PARENT, RESULT, Run, plain_bases, rate, searches, trainings
from veneer.storage import write_text
from veneer.training.allocator import sparing_environment
from veneer.training.progress import duration

CONFIG = "compare.yaml"
_POLL = 0.1


@dataclass(frozen=True)
class Done:
    """A finished run.

    Attributes:
        run: what it was.
        result: what came out; ``error`` if it failed.
    """

    run: Run
    result: dict[str, Any]


def compare(config: CompareConfig, entries: Sequence[Entry], *, jobs: int, say: Callable[[str], None]) -> list[Done]:
    """Run all that has no result yet.

    Args:
        config: of the comparison.
        entries: its lines.
        jobs: processes at a time.
        say: told what begins and what came out.

    Raises:
        DataError: some of the data cannot be read, or is not for the task.
        OutputError: the folder holds other runs of these names or of other data, or another comparison is at work.
        Interrupted: Ctrl-C; the same command goes on.
    """
    from veneer.training import folder

    data = checked(config, entries)
    with folder.held(config.output):
        write_text(config.output / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        runner = _Runner(config.output, jobs, say, data)
        bases = plain_bases(config, entries)
        there = sum(runner.finished(run) for run in bases)
        done = runner.run(bases)
        if _has_head(done):
            entries = [*entries, *head_baselines(config, entries)]
        tries = searches(config, entries)
        planned = [*tries, *trainings(config, entries, {entry.label: rate(entry) for entry in entries})]
        there += sum(runner.finished(run) for run in planned)  # by name: rates are known after the search
        if there:
            say(f"{there} of {len(bases) + len(planned)} runs are done already.")
        runner.left = sum(not runner.finished(run) for run in planned)
        done += (searched := runner.run(tries))
        rates = {entry.label: _best_rate(entry, searched) for entry in entries}
        return done + runner.run(trainings(config, entries, rates))


class _Runner:
    """Runs processes.

    Attributes:
        left: trainings still to come, in this call of `run` and in later ones.
    """

    def __init__(self, output: Path, jobs: int, say: Callable[[str], None], data: Mapping[str, Any]) -> None:
        self.output, self.jobs, self.say, self.data = output, jobs, say, data
        self.seconds: list[float] = []
        self.left = 0

    def finished(self, run: Run) -> bool:
        """Whether a run of this name has come out."""
        path = run.folder(self.output) / RESULT
        return path.exists() and not json.loads(path.read_text(encoding="utf-8")).get("error")

    def run(self, runs: Sequence[Run]) -> list[Done]:
        """These, in their order; those that came out are not run again."""
        runs = [run.on(self.data) for run in runs]
        found = {run.name: run.result(self.output) for run in runs}
        waiting = [run for run in runs if (found[run.name] or {"error": "not run yet"}).get("error")]
        active: list[tuple[Run, subprocess.Popen[bytes], float]] = []
        try:
            while waiting or active:
                while waiting and len(active) < self.jobs:
                    run = waiting.pop(0)
                    active.append((run, self._start(run), time.perf_counter()))
                time.sleep(_POLL)
                for run, process, began in [each for each in active if each[1].poll() is not None]:
                    active.remove((run, process, began))
                    found[run.name] = self._ended(run, process, time.perf_counter() - began)
                    self._tell(run, found[run.name] or {})
        except KeyboardInterrupt:
            raise Interrupted("Stopped; the same command goes on with the runs that are not finished.") from None
        finally:
            for _, process, _ in active:
                process.kill()
                process.wait()
        return [Done(run, found[run.name] or {}) for run in runs]

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        folder = run.prepare(self.output)
        threads = max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= sparing_environment() or os.environ
        environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "veneer.evaluation.comparison.worker", str(folder)]
        with (folder / OUTPUT).open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def _ended(self, run: Run, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        result = run.result(self.output)
        if run.kind != "base":  # a run without training tells nothing of how long the others take
            self.seconds.append(seconds)
            self.left -= 1
        if result is not None:
            return result
        log = run.folder(self.output) / OUTPUT
        with contextlib.suppress(OSError):
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        why = "killed, perhaps for want of memory" if process.returncode == -9 else f"exit code {process.returncode}"
        return {"error": f"The process ended without a result ({why}). {''.join(last)} See {log}."}

    def _tell(self, run: Run, result: dict[str, Any]) -> None:
        told = f"failed: {result['error']}" if result.get("error") else _told(result)
        rest = ""
        if self.left > 0 and self.seconds:
            rest = f"  (about {duration(sum(self.seconds) / len(self.seconds) * self.left / self.jobs)} left)"
        self.say(f"{run.name}: {told}{rest}")


def _told(result: dict[str, Any]) -> str:
    told = [f"validation loss {result['after']['loss']:.4f}"] if result.get("after") else []
    for name, test in result.get("tests", {}).items():
        told.append(f"{test['metric']} {sum(test['values']) / sum(test['items']):.4f} on {test['rows']} rows of {name}")
    return ", ".join(told) or "done"


def _has_head(done: Sequence[Done]) -> bool:
    """Whether the task trains a head of its own: then there is something to compare a head alone with."""
    return any(each.result.get("head") for each in done)


def _best_rate(entry: Entry, searched: Sequence[Done]) -> float:
    """Of the rates tried, that of the lowest validation loss; the entry's own where none was tried or all failed."""
    found = [
        (each.result["after"]["loss"], each.result["learning_rate"])
        for each in searched
        if each.run.entry == entry.label and each.result.get("after")
    ]
    return min(found)[1] if found else rate(entry)
