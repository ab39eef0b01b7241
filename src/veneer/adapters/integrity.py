"""Whether the files of an adapter folder are what they should be: nothing from elsewhere is trusted, none unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from veneer.errors import AdapterFileError
from veneer.storage import sha256

MOST_HEADER = 100_000_000
"""Bytes of the longest header safetensors allows; an adapter's has some hundred a tensor."""
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterFileError: the file leads out of its folder, cannot be read, or holds something else.
    """
    inside(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} is no JSON object.")
    return value


def inside(path: Path) -> None:
    """Check that a file is no link that leads out of its folder (the hub's cache may link to its own blobs).

    Raises:
        AdapterFileError: it is.
    """
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise AdapterFileError(
            f"{path} is a link to {target}, outside of its folder, and is not followed. Put a copy of the file there."
        )


def read_weights(path: Path, expected: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        expected: its hash, where that is known.

    Raises:
        AdapterFileError: it is missing, no safetensors file, damaged, or holds what no adapter is made of.
    """
    if not path.exists() and not path.is_symlink():
        pickled = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.parent.glob(pattern)
        )
        there = f" There is {pickled[0]}." if pickled else ""
        raise AdapterFileError(
            f"{path.parent} has no {path.name}.{there} Pickled weights (.bin) are never read, as they may run any "
            "program: have them saved as safetensors where they come from."
        )
    inside(path)
    try:
        _check_header(path)
        if expected and sha256(path) != expected:
            raise AdapterFileError(f"{path} is damaged: it is not the file veneer.json describes. Get it again.")
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}.") from error
    _check_tensors(path, state)
    return state


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        opens = file.read(1) == b"{"  # a header may be as long as a pickle's first bytes would say
        if start.startswith(_PICKLES) and not opens:
            raise AdapterFileError(f"{path} is damaged or no safetensors file: it is a pickle, which is never read.")
        if size < 8:
            raise AdapterFileError(f"{path} is damaged or no safetensors file: it has {size} bytes. Get it again.")
        length = int.from_bytes(start, "little")
        if length > MOST_HEADER:
            raise AdapterFileError(
                f"{path} is damaged or no safetensors file: it claims a header of {length:,} bytes, "
                f"and {MOST_HEADER:,} are the most there may be. Get it again."
            )
        file.seek(len(start))
        header = file.read(length)
    try:
        tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
        needed = 8 + length + max((about["data_offsets"][1] for about in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: its header is broken ({error}).") from error
    if size != needed:
        what = "cut short" if size < needed else "too long"
        raise AdapterFileError(f"{path} is damaged: {what}, {size:,} bytes instead of {needed:,}. Get it again.")


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    if not state:
        raise AdapterFileError(f"{path} holds no tensors.")
    for name, tensor in state.items():
        if tensor.dtype in _INTEGERS:
            continue
        if not tensor.dtype.is_floating_point:
            raise AdapterFileError(f"{path} has {name} as {tensor.dtype}, which no adapter is made of.")
        if not bool(tensor.float().isfinite().all()):
            raise AdapterFileError(
                f"{path} has values in {name} that are no numbers (NaN or infinite): the training that made it went "
                "wrong. Use an earlier checkpoint of it."
            )
