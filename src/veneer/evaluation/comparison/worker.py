"""One run of a comparison, in a process of its own, so that its memory is its own:

    python -m veneer.evaluation.comparison.worker FOLDER

reads ``spec.json`` in the folder and writes ``result.json``. What is wrong with a run (a method that does not suit the
base) is a result, too. A run that is cut off leaves no result, and is begun anew: a training gone on with would tell
only part of its time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from veneer.adapters import Adapter, Base
from veneer.data import read
from veneer.errors import VeneerError
from veneer.evaluation.by_row import by_row
from veneer.evaluation.comparison.data import MEASURED, known, unseen
from veneer.evaluation.comparison.meter import Meter
from veneer.evaluation.comparison.schedule import PARENT, RESULT, SPEC
from veneer.evaluation.forgetting import forgetting
from veneer.storage import write_json
from veneer.tasks import Task, adapter_task
from veneer.training.config import RunConfig
from veneer.training.facts import versions
from veneer.training.runs import run, set_up

if TYPE_CHECKING:
    from datasets import Dataset

_TRAINING = "training"
_DIGITS = 6
_BATCH = 32


def main() -> None:
    """Run what the folder given says."""
    _end_with(int(os.environ.get(PARENT) or os.getppid()))
    folder = Path(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    try:
        result = work(spec, folder / _TRAINING)
    except VeneerError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    shutil.rmtree(folder / _TRAINING, ignore_errors=True)
    write_json(folder / RESULT, {"spec": spec, "versions": versions(), **result})


def work(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, score, and measure what was forgotten, in ``folder``.

    Raises:
        VeneerError: something of it cannot be done.
    """
    shutil.rmtree(folder, ignore_errors=True)
    config = RunConfig.parse({**spec["config"], "output": folder})
    if spec["kind"] == "base":
        adapter, task, _ = set_up(config)
        return {"tests": _scored(spec, task, adapter.base, None, config), "head": bool(task.head(adapter.base, seed=0))}
    meter, watch = Meter(), Watch(spec["forgetting"])
    adapter, result = run(config, callbacks=[meter, watch])
    task = adapter_task(adapter)
    seconds = meter.seconds
    if adapter.device.type == "cpu":  # what else the machine did meanwhile is no cost of the method
        seconds = meter.cpu_seconds / torch.get_num_threads()
    found: dict[str, Any] = {
        "train_rows": adapter.record["data"]["train"]["rows"],
        "steps": result.steps,
        "seconds": seconds,
        "wall_seconds": meter.seconds,
        **_energy(meter.joules, seconds, spec["power"]),
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / seconds if seconds else None,
        "peak_memory": result.peak_memory,
        "trainable": result.trainable,
        "trainable_share": result.trainable_share,
        "stored": sum(file.stat().st_size for file in (folder / "adapter").rglob("*.safetensors")),
        "base_bytes": result.base_bytes,
        "learning_rate": config.train.learning_rate,
        "before": result.before,
        "after": result.after,
        "best_step": result.best_step,
        "warnings": list(result.warnings),
        "course": watch.course,
        "tests": _scored(spec, task, adapter.base, adapter, config),
    }
    if spec["forgetting"]:
        found["forgetting"] = forgetting(adapter, task=task, own=spec["retention"]).plain()
    return found


class Watch(transformers.TrainerCallback):
    """Notes at each validation how far the run has learned, and what it has forgotten by then.

    Attributes:
        course: a mapping a validation: ``step``, the validation's metrics, and ``forgotten``, if that is measured.
    """

    def __init__(self, forgetting: bool) -> None:
        self.forgetting = forgetting
        self.course: list[dict[str, Any]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note it."""
        adapter: Adapter = kwargs["model"]
        told = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items() if name != "eval_runtime"}
        entry = {"step": state.global_step, **told}
        if self.forgetting:
            changes = forgetting(adapter, brief=True).changes
            entry["forgotten"] = changes[0].forgotten.value if changes else None
        self.course.append(entry)


def _scored(
    spec: Mapping[str, Any], task: Task, base: Base, adapter: Adapter | None, config: RunConfig
) -> dict[str, Any]:
    """What came out on each set of held-out rows: a value a row."""
    training = read(config.data.train, split=config.data.split, columns=config.data.columns) if spec["tests"] else ()
    seen = known(task, training)
    metric = spec["metric"] or ("loss" if task.plain_base else "accuracy")
    found = {}
    for name, source in spec["tests"].items():
        rows, left_out = held_out(source, spec, task, seen, config)
        found[name] = {
            "rows": len(rows),
            "left_out": left_out,
            "metric": metric,
            **_values(metric, task, base, adapter, rows),
        }
    return found


def held_out(
    source: Any, spec: Mapping[str, Any], task: Task, seen: set[str], config: RunConfig
) -> tuple[Dataset, int]:
    """The rows of a source that are not among the training data, and how many are.

    Raises:
        DataError: they cannot be read, or none are left.
    """
    rows = read(source, split=spec["test_split"], columns=config.data.columns)
    task.check_format(rows)
    others = unseen(rows, source, task, seen)
    left_out, rows = len(rows) - len(others), others
    if spec["test_limit"] is not None and spec["test_limit"] < len(rows):
        rows = rows.shuffle(seed=0).select(range(spec["test_limit"]))
    return rows, left_out


def _values(metric: str, task: Task, base: Base, adapter: Adapter | None, rows: Dataset) -> dict[str, Any]:
    """``values`` summed over each row's items, and ``items``."""
    everything, model = list(rows), base.model if adapter is None else adapter
    if metric not in MEASURED:
        with base.using(None):
            scores = task.score(everything, list(task.predict(model, base, everything, batch_size=_BATCH)))
        return {"values": scores[metric], "items": [1] * len(everything)}
    if adapter is None and not task.plain_base:
        return {"values": task.commonest(everything)["accuracy"], "items": [1] * len(everything)}
    prepared = task.prepare(rows, base.tokenizer)
    with base.using(None):
        found = by_row(task, model, base, prepared, len(rows), _BATCH)
    values = found.loss if metric == "loss" else found.correct
    return {"values": [round(value, _DIGITS) for value in values.tolist()], "items": found.items.astype(int).tolist()}


def _energy(measured: float | None, seconds: float, power: float | None) -> dict[str, Any]:
    """Joules, and how they are known."""
    if measured is not None:
        return {"joules": measured, "energy": "measured"}
    if power is not None:
        return {"joules": power * seconds, "energy": "estimated"}
    return {"joules": None, "energy": None}


def _end_with(parent: int) -> None:
    """End when the process that started this one does, lest a comparison that is begun again meets its old runs. It
    may have ended already, while this one was still importing."""
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
