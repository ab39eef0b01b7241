"""Keeping what an evaluation found with the adapter it is of: in its record, and so in its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapters import Adapter
from veneer.adapters.files import adapter_folder, read_record
from veneer.errors import AdapterFileError


def keep(adapter: Adapter, folder: str | Path, found: Mapping[str, Any]) -> None:
    """Write an evaluation, as plain values, into the folder an adapter was loaded from; all or nothing. An earlier one
    is replaced. The weights stay the same, and so does a card that a person has edited.

    Raises:
        AdapterFileError: the folder was not written by veneer.
        OutputError: it cannot be written.
    """
    path = adapter_folder(folder)
    if not read_record(path):
        raise AdapterFileError(
            f"{path} has no veneer.json, so there is no record to keep an evaluation in; load the adapter and save it "
            "to another folder first."
        )
    adapter.record = {**adapter.record, "evaluation": dict(found)}
    adapter.save(path)
