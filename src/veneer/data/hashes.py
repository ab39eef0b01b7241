"""Hashes of data: of files as they lie on disk, and of rows as they are learned from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.catalogue import DATASETS
from veneer.data.formats import detect
from veneer.data.reading import data_files
from veneer.storage import sha256

if TYPE_CHECKING:
    from datasets import Dataset


def hash_rows(rows: Dataset) -> str:
    """Hex digest of what a task reads of the rows, in their order; the same whatever file they come from."""
    wanted = (*detect(rows.column_names).columns, "task")
    rows = rows.select_columns([column for column in wanted if column in rows.column_names]).with_format(None)
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        for row in zip(*batch.values(), strict=True):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def hash_files(source: Any, split: str) -> dict[str, str]:
    """Path -> hex digest of each local or catalogued file that `read` reads; none for what comes from a hub."""
    if isinstance(source, list | tuple):
        return {name: digest for part in source for name, digest in hash_files(part, split).items()}
    if isinstance(source, Mapping):
        return hash_files(source["path"], source.get("split") or split) if "path" in source else {}
    if not isinstance(source, str | Path):
        return {}
    if source in DATASETS:
        file = DATASETS[str(source)].fetch(split)
        return {f"{source}:{file.name}": sha256(file)}
    path = Path(source).expanduser()
    files = data_files(path) if path.is_dir() else [path] if path.is_file() else []
    return {str(file): sha256(file) for file in files}
