"""What a continued adapter learned before: its old held-out rows, had again, so that forgetting is seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.adapters import Adapter
from veneer.data.hashes import hash_rows
from veneer.errors import VeneerError
from veneer.tasks import Prepared, Task
from veneer.tasks.measuring import measure
from veneer.training.config import DataSettings
from veneer.training.rows import parts_of


def lessons(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each data set an adapter with this training record has learned, oldest first, as far as it was held out from."""
    config, data = record.get("config"), record.get("data", {})
    before = list(record.get("earlier", []))
    if config and "validation" in data:
        before.append({"settings": config["data"], "seed": config["train"]["seed"], **data["validation"]})
    return before


class Earlier:
    """The old held-out rows of an adapter, and how it does on them.

    Args:
        adapter: it, as it was before it is trained on.
        task: its task.
        lessons: `lessons` of its record.
        batch_size: rows a batch.
    """

    def __init__(self, adapter: Adapter, task: Task, lessons: list[dict[str, Any]], batch_size: int) -> None:
        self.adapter, self.task, self.batch_size = adapter, task, batch_size
        self._sets = [self._again(lesson) for lesson in lessons]
        self._before = [self._score(prepared) for _, prepared in self._sets]

    def report(self) -> tuple[dict[str, Any], ...]:
        """Scores before and, of the adapter as it is now, after: see `Result.earlier`."""
        told = []
        for (about, prepared), before in zip(self._sets, self._before, strict=True):
            told.append(about if prepared is None else {**about, "before": before, "after": self._score(prepared)})
        return tuple(told)

    def _again(self, lesson: Mapping[str, Any]) -> tuple[dict[str, Any], Prepared | None]:
        settings = DataSettings(**lesson["settings"])
        about = {"data": _name(settings), "rows": lesson["rows"]}
        try:
            _, *held_out = parts_of(settings, lesson["seed"])
            if not held_out or hash_rows(held_out[0].rows) != lesson["sha256"]:
                return {**about, "missing": "the data changed since"}, None
            return about, self.task.prepare(held_out[0].rows, self.adapter.base.tokenizer)
        except VeneerError as error:
            return {**about, "missing": str(error)}, None

    def _score(self, prepared: Prepared | None) -> dict[str, float] | None:
        if prepared is None:
            return None
        self.adapter.eval()
        return measure(self.task, self.adapter, self.adapter.base, prepared, self.batch_size)


def _name(settings: DataSettings) -> str:
    apart = not isinstance(settings.validation, float | int)
    source = settings.validation if apart else settings.train
    names = [
        str(part["path"] if isinstance(part, Mapping) else part)
        for part in (source if isinstance(source, list) else [source])
    ]
    return ", ".join(names)
