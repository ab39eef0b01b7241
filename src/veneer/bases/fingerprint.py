"""A fingerprint of a backbone: the same for the same architecture and weights, in whatever dtype they are loaded.

    sha256( for each tensor, by name:  name, shape, its values rounded to bfloat16 )

Rounding to the narrowest dtype in use makes a float32 checkpoint loaded as bfloat16 equal to itself loaded as
float32. Heads are left out: they belong to tasks. Reading all weights takes a moment (about a second a gigabyte),
so results for unchanged folders are kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases.quantized import dequantized, kind_of
from veneer.storage import cache_dir, locked, write_json

_SCHEME = "v1"


def fingerprint(
    backbone: nn.Module,
    folder: Path | None = None,
    missing: Collection[str] = (),
    original: Callable[[], nn.Module] | None = None,
) -> str:
    """Hex digest of ``backbone``, looked up by the state of ``folder`` where the weights come from one.

    Args:
        backbone: the model without its head.
        folder: the folder or file its weights were read from, if any.
        missing: full names of parameters that hold random values and so don't count.
        original: loads the backbone whose weights count, if those of ``backbone`` were quantised.
    """
    if folder is None:
        return _digest(original() if original else backbone, missing)
    store = cache_dir() / "fingerprints.json"
    key = f"{_SCHEME}:{type(backbone).__name__}:{_state(folder)}"
    with locked(store):
        known: dict[str, Any] = _read(store)
        if key not in known:
            known[key] = _digest(original() if original else backbone, missing)
            write_json(store, known)
    return str(known[key])


def _digest(backbone: nn.Module, missing: Collection[str]) -> str:
    digest = hashlib.sha256()
    model_type = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    digest.update(f"{_SCHEME}:{model_type}".encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        if any(full == name or full.endswith("." + name) for full in missing):
            continue
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_canonical(tensor))
    return digest.hexdigest()


def _canonical(tensor: Tensor) -> bytes:
    if kind_of(tensor) is not None:
        tensor = dequantized(tensor)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16).view(torch.int16)
    return tensor.numpy().tobytes()


def _state(folder: Path) -> str:
    """Changes whenever a weight file in the folder does."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _read(store: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
