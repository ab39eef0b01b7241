"""What to plan, from a training config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapters import Base
from veneer.errors import BaseError, ConfigError, FetchError
from veneer.methods import Method, method_class
from veneer.planning.machine import HERE, parse_size
from veneer.planning.plan import Data, Request, with_own_settings
from veneer.tasks import Task, choose_task, load_base, task_class
from veneer.training.config import RunConfig, read_config
from veneer.training.forecast import largest_pass
from veneer.training.passes import count
from veneer.training.rehearsal import Batch
from veneer.training.rows import parts_of

_LENGTH = 512
_NO_DATA = ""
SUITED = ""
"""In place of a base's name: any that suits."""


def from_config(
    arguments: Sequence[str],
    *,
    base: str | None = None,
    methods: str | None = None,
    device: str | None = None,
    memory: str | None = None,
    length: int | None = None,
    labelled: float = 1.0,
    variants: int = 100,
    watts: float | None = None,
    default_base: str | None = None,
) -> Request:
    """A request from a YAML file and overrides, as for training; data and output may be left out.

    Raises:
        ConfigError: anything is wrong with it.
        UnknownName: there is no such method.
        DataError: the data can't be read.
    """
    if not 0 < labelled <= 1:
        raise ConfigError(f"--labelled {labelled}: a share of the tokens lies above 0, and is at most 1.")
    has_file = bool(arguments) and "=" not in arguments[0]
    defaults: dict[str, Any] = {"output": ".", "data": {"train": _NO_DATA}}
    if default_base is not None:
        defaults["base"] = default_base
    overrides = arguments[1:] if has_file else arguments
    config = read_config(Path(arguments[0]) if has_file else None, overrides, defaults=defaults, base=base)
    data, task, batch, target = None, None, None, torch.device("cpu" if device in HERE else "cuda")
    if config.data.train != _NO_DATA:
        data, task, batch = _data(config, target)
        labelled = data.labelled
    if batch is None or length is not None:
        batch = _batch(config, length or min(config.task.get("max_length") or _LENGTH, _LENGTH), labelled, target)
    return Request(
        base=config.base,
        methods=_methods(methods, config, overrides, has_file),
        batch=batch,
        passes=math.ceil(config.train.batch_size / batch.rows) * config.train.accumulation,
        step_rows=config.train.batch_size * config.train.accumulation,
        checkpointing=config.train.checkpointing,
        dtype=config.dtype,
        quantize=config.quantize,
        device=device,
        memory=parse_size(memory) if memory is not None else None,
        variants=variants,
        task=task,
        data=data,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        watts=watts,
    )


def _batch(config: RunConfig, tokens: int, labelled: float, device: torch.device) -> Batch:
    """A pass of rows that are all of this length."""
    rows = config.train.batch_size
    parts = count(rows, tokens, config.train.tokens_of_a_pass(device, [tokens]))
    return Batch(math.ceil(rows / parts), tokens, labelled)


def _data(config: RunConfig, device: torch.device) -> tuple[Data, Task, Batch]:
    """What the training rows are like, the task they ask for, and the largest pass there could be of them."""
    rows = parts_of(config.data, config.train.seed)[0].rows
    settings = {key: value for key, value in config.task.items() if key != "name"}
    name = config.task.get("name") or choose_task(rows).name
    loaded = _loaded(config.base, name)
    task = task_class(name).for_rows(rows, loaded, **settings)
    if loaded is None or loaded.tokenizer is None:
        lengths = [sum(len(str(value)) for value in row.values() if value is not None) // 4 + 1 for row in rows]
        lengths = [min(each, task.max_length) for each in lengths]
        data = Data(len(rows), max(lengths), sum(lengths) / len(lengths), 1.0, counted=False)
        return data, task, largest_pass(lengths, lengths, config.train, device)
    prepared = task.prepare(rows, loaded.tokenizer)
    lengths = prepared.examples["length"][:]
    learned = prepared.tokens.learned.tolist()
    share = min(sum(learned) / max(sum(lengths), 1), 1.0) or 1.0
    data = Data(len(lengths), prepared.longest, sum(lengths) / len(lengths), share, counted=True)
    return data, task, largest_pass(lengths, learned, config.train, device)


def _loaded(base: str, task: str) -> Base | None:
    """Its tokenizer and architecture, where they are on this machine or can be had; None where only sizes are known."""
    if base == SUITED:
        return None
    try:
        return load_base(base, task=task, weights=False)
    except (BaseError, FetchError):
        return None


def _methods(names: str | None, config: RunConfig, overrides: Sequence[str], has_file: bool) -> list[Method]:
    """Those named, each with the config's settings if it is the config's; the config's alone, if it names one."""
    if names is None:
        named = has_file or any(each.startswith("method") for each in overrides)
        return [config.method] if named else []
    chosen = [method_class(name.strip()) for name in names.split(",")]
    return [config.method if isinstance(config.method, cls) else with_own_settings(cls) for cls in chosen]
