"""What a run will hold, told before it holds it; kept in the adapter's record and card.

The largest pass of a step is rehearsed on shapes (`veneer.training.rehearsal`), and so is serving a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from veneer.adapters import Adapter
from veneer.bases.architecture import Architecture
from veneer.tasks import Prepared, Task
from veneer.training.allocator import gaps
from veneer.training.rehearsal import Batch, Rehearsal, served
from veneer.training.settings import TrainSettings

_PROMPT = 2048
"""Tokens of the prompt that is served, if the base takes so many."""


def forecast(adapter: Adapter, task: Task, prepared: Prepared, settings: TrainSettings) -> dict[str, Any] | None:
    """Bytes by part, and their ``total``, of the ``training`` step that holds most and of ``serving``, each with the
    ``rows`` and ``tokens`` it is for; None where the base is none that can be rehearsed.
    """
    base = adapter.base
    if not isinstance(base.model, transformers.PreTrainedModel):
        return None
    found = Architecture(base.name, base.model.config, task.auto_class, base.dtype)
    lengths, learned = prepared.examples["length"][:], prepared.tokens.learned.tolist()
    batch = largest_pass(lengths, learned, settings, adapter.device)
    held = sum(each.nbytes for each in {*adapter.parameters(), *adapter.buffers()})
    room = found.positions or _PROMPT
    prompt = Batch(rows=1, tokens=min(_PROMPT, room))
    try:
        step = Rehearsal(found, adapter.method, task, base.dtype, settings.checkpointing).step(batch, held)
        serving = served(found, base.dtype, prompt)
    except Exception:  # whatever a model does that shapes alone don't tell: a run needs no forecast
        return None
    memory = dict(step.memory)
    if adapter.device.type == "cpu":
        memory["gaps"] = gaps(step.passing, step.made / max(found.layers, 1))
    asked = {name: round(value) for name, value in serving.phases["forward"].items()}
    return {
        "training": _told({**memory, "weights": base.nbytes}, batch),
        "serving": _told({**asked, "weights": base.nbytes, "adapter": adapter.nbytes}, prompt),
    }


def largest_pass(
    lengths: Sequence[int], learned: Sequence[int], settings: TrainSettings, device: torch.device
) -> Batch:
    """The pass of most tokens that there could be: rows of like length come together.

    Args:
        lengths: of the rows, in tokens.
        learned: tokens of each that carry loss; those that have most are taken to be in it.
        settings: of the training.
        device: it runs on.
    """
    lengths = sorted(lengths, reverse=True)
    limit = settings.tokens_of_a_pass(device, lengths)

    def rows_of(first: int) -> int:
        """As many as fit with the longest of them at this place."""
        most = min(settings.batch_size, len(lengths) - first)
        return min(most, max(limit // max(lengths[first], 1), 1)) if limit else most

    first = max(range(len(lengths)), key=lambda first: lengths[first] * rows_of(first))
    rows, longest = rows_of(first), lengths[first]
    most = sum(sorted(learned, reverse=True)[:rows])
    return Batch(rows, longest, min(most / (rows * longest), 1.0) or 1.0)


def _told(parts: dict[str, int], batch: Batch) -> dict[str, int]:
    parts = {name: value for name, value in parts.items() if value and name != "total"}
    return {"rows": batch.rows, "tokens": batch.tokens, **parts, "total": sum(parts.values())}
