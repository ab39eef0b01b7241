"""Tasks of EleutherAI's lm-evaluation-harness, beside the plain base: ``pip install 'veneer[lm-eval]'``.

The harness runs the base's own model, once plain and once with the adapter acting, so that every method works with it
and nothing is merged or copied. Its own tasks download their data from a hub; a folder of task files of yours, with
data beside them, needs none.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters import Adapter
from veneer.errors import ConfigError, DataError, did_you_mean
from veneer.evaluation.scores import Score
from veneer.tasks import adapter_task

_Z = 1.959964
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class HarnessResult:
    """A metric of a task.

    Attributes:
        task: its name.
        metric: likewise.
        adapter: score of the adapter.
        base: score of the plain base.
    """

    task: str
    metric: str
    adapter: Score
    base: Score


def harness(
    adapter: Adapter,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[HarnessResult]:
    """Run tasks of the harness through an adapter and its plain base.

    Args:
        adapter: of a language model.
        tasks: their names.
        folder: with task files (YAML) of your own.
        limit: rows of each task.
        batch_size: rows a batch.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or the adapter is for no language model.
        DataError: a task's data cannot be had.
    """
    lm_eval = _lm_eval()
    if not adapter_task(adapter).plain_base:
        raise ConfigError("lm-evaluation-harness runs language models; this adapter is for another task.")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is no folder; give one with task files (YAML) of lm-evaluation-harness.")
    manager = lm_eval.tasks.TaskManager(include_path=str(Path(folder).resolve()) if folder else None)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ConfigError(
            f"lm-evaluation-harness has no task {unknown[0]!r}.{did_you_mean(unknown[0], manager.all_tasks)}"
        )
    adapter.eval()
    options = {"tasks": list(tasks), "task_manager": manager, "limit": limit, "log_samples": False}
    found = {}
    for name in (None, adapter.name):
        with adapter.base.using(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of its many dependencies are not the user's
            model = lm_eval.models.huggingface.HFLM(
                pretrained=adapter.base.model, tokenizer=adapter.base.tokenizer, batch_size=batch_size
            )
            try:
                found[name] = lm_eval.simple_evaluate(model=model, bootstrap_iters=1000, **options)["results"]
            except (OSError, ValueError) as error:
                raise DataError(f"lm-evaluation-harness could not run {', '.join(tasks)}: {error}") from error
    return [
        HarnessResult(task, key.removesuffix(",none"), _score(scores, key), _score(found[None][task], key))
        for task, scores in found[adapter.name].items()
        for key, value in scores.items()
        if isinstance(value, float) and "_stderr" not in key
    ]


def _score(scores: dict[str, Any], key: str) -> Score:
    name, _, kind = key.partition(",")
    error = scores.get(f"{name}_stderr,{kind}")
    value = float(scores[key])
    return Score(value, value - _Z * error, value + _Z * error) if isinstance(error, float) else Score(value)


def _lm_eval() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval
            import lm_eval.models.huggingface
            import lm_eval.tasks
    except ImportError as error:
        raise ConfigError("This needs lm-evaluation-harness: pip install 'veneer[lm-eval]'.") from error
    return lm_eval
