"""Loading a base for a task, and an adapter together with the base it was made for."""

from __future__ import annotations

import os
from typing import Any

import torch

from veneer.adapters import Adapter, Base
from veneer.adapters.files import base_name, peft_task_type, read_record
from veneer.bases import load_pretrained
from veneer.errors import AdapterError
from veneer.tasks.base import Task
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.registry import TASKS, task_class, task_from_config


def load_base(
    name: str | os.PathLike[str],
    *,
    task: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    weights: bool = True,
    quantize: str | None = None,
) -> Base:
    """Load a base.

    Args:
        name: a hub id, a folder with safetensors, a ``.gguf`` file, or a catalogue name (``veneer models``).
        task: ``"causal-lm"`` or ``"sequence-classification"``, to get the head it needs; by default the head
            the checkpoint was saved with.
        dtype: ``"auto"`` keeps the checkpoint's where this device computes it fast.
        device: by default CUDA, MPS or CPU, the first there is.
        revision: of a hub id.
        offline: True forbids downloads.
        weights: False leaves them out: architecture and tokenizer alone, for looking at data.
        quantize: ``"nf4"`` or ``"int8"``: keep the linear maps inside the layers in so many bits (QLoRA); by default
            as they are.

    Raises:
        BaseError: the name leads to nothing that can be loaded.
        FetchError: a download failed or is forbidden.
    """
    found = load_pretrained(
        name,
        auto_class=task_class(task).auto_class if task else None,
        dtype=dtype,
        device=device,
        revision=revision,
        offline=offline,
        weights=weights,
        quantize=quantize,
    )
    origin = {
        "name": found.name,
        "revision": found.revision,
        "folder": found.folder,
        "missing": found.missing,
        "original": found.original,
    }
    return Base(found.model, found.tokenizer, **origin)


def load_adapter(folder: str | os.PathLike[str], *, base: str | None = None, **options: Any) -> Adapter:
    """Load an adapter together with its base.

    Args:
        folder: an adapter folder, or a training run's folder.
        base: where to find the base, if not where the folder says.
        options: of `load_base`.

    Raises:
        AdapterFileError: the folder is no intact adapter.
        BaseMismatch: the base found is not the one it was made for.
    """
    return load_base_for(folder, base, **options).load(folder)


def load_base_for(folder: str | os.PathLike[str], base: str | None = None, **options: Any) -> Base:
    """Load the base an adapter folder is for, with the head its task needs, quantised as it was in training.

    Args:
        folder: an adapter folder, or a training run's folder.
        base: where to find the base, if not where the folder says.
        options: of `load_base`.

    Raises:
        AdapterFileError: the folder is no adapter folder, or doesn't say.
        BaseError: there is no such base.
    """
    record = read_record(os.fspath(folder))
    options.setdefault("quantize", record.get("base", {}).get("quantized"))
    task = record.get("task", {}).get("name") or _named_by_peft(peft_task_type(os.fspath(folder)))
    return load_base(base or base_name(os.fspath(folder)), task=task, **options)


def adapter_task(adapter: Adapter) -> Task:
    """The task an adapter was trained for.

    Raises:
        AdapterError: it doesn't say.
    """
    if adapter.task.get("name"):
        return task_from_config(adapter.task)
    if _named_by_peft(adapter.task.get("peft_task_type")) == CausalLM.name:
        return CausalLM.for_rows(None, adapter.base)
    raise AdapterError(
        f"Adapter {adapter.name!r} does not say what task it is for, or with which labels; pass the task."
    )


def _named_by_peft(task_type: str | None) -> str | None:
    return next((task.name for task in TASKS.values() if task.peft_task_type == task_type), None)
