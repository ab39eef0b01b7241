"""What a run's result depends on besides its config: data, base, where it continues from, versions.

Kept in the run's folder while it goes on, and in the adapter's files for good, so that a run that is resumed or
reproduced on something else is noticed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

import veneer
from veneer.data import Part
from veneer.data.hashes import hash_files, hash_rows
from veneer.training.config import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset


def of_data(settings: DataSettings, parts: Sequence[Part]) -> dict[str, Any]:
    """Hashes of the files, and of the rows used of them (training first), by what they are used for."""
    facts = {"train": {**of_rows(parts[0].rows), "files": hash_files(settings.train, settings.split)}}
    for held_out in parts[1:]:
        apart = not isinstance(settings.validation, float | int)
        files = hash_files(settings.validation, settings.validation_split) if apart else {}
        facts["validation"] = {**of_rows(held_out.rows), "files": files}
    return facts


def of_rows(rows: Dataset) -> dict[str, Any]:
    """How many, and their hash."""
    return {"rows": len(rows), "sha256": hash_rows(rows)}


def versions() -> dict[str, str | int]:
    """What the last bits of a result depend on."""
    return {
        "veneer": veneer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says which data are not what they were, or None."""
    for part in sorted(before.keys() | now.keys()):
        old, new = before.get(part, {}), now.get(part, {})
        if old.get("sha256") == new.get("sha256"):
            continue  # the rows are the same, whatever became of the files
        files = {*old.get("files", {}), *new.get("files", {})}
        changed = sorted(f for f in files if old.get("files", {}).get(f) != new.get("files", {}).get(f))
        where = f" ({', '.join(changed)})" if changed else ""
        return f"the {part} data{where}: {old.get('rows', 'no')} rows then, {new.get('rows', 'no')} rows now" + (
            ", of other content" if old.get("rows") == new.get("rows") else ""
        )
    return None


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says which versions are not what they were, or None."""
    changes = [f"{name} {before[name]} → {now[name]}" for name in before if name in now and before[name] != now[name]]
    return ", ".join(changes) or None
