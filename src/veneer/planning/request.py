"""What to plan, from a training config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.errors import ConfigError
from veneer.methods import Method, method_class
from veneer.planning.machine import parse_size
from veneer.planning.plan import Request
from veneer.training.config import RunConfig, read_config
from veneer.training.rehearsal import Batch

_LENGTH = 512
_NO_DATA = ""


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
) -> Request:
    """A request from a YAML file and overrides, as for training; data and output may be left out.

    Raises:
        ConfigError: anything is wrong with it.
        UnknownName: there is no such method.
    """
    if not 0 < labelled <= 1:
        raise ConfigError(f"--labelled {labelled}: a share of the tokens lies above 0, and is at most 1.")
    has_file = bool(arguments) and "=" not in arguments[0]
    defaults = {"output": ".", "data": {"train": _NO_DATA}}
    overrides = arguments[1:] if has_file else arguments
    config = read_config(Path(arguments[0]) if has_file else None, overrides, defaults=defaults, base=base)
    most = config.task.get("max_length")
    return Request(
        base=config.base,
        methods=_methods(methods, config, overrides, has_file),
        batch=Batch(config.train.batch_size, length or min(most or _LENGTH, _LENGTH), labelled),
        accumulation=config.train.accumulation,
        checkpointing=config.train.checkpointing,
        dtype=config.dtype,
        quantize=config.quantize,
        device=device,
        memory=parse_size(memory) if memory is not None else None,
        variants=variants,
    )


def _methods(names: str | None, config: RunConfig, overrides: Sequence[str], has_file: bool) -> list[Method]:
    """Those named, each with the config's settings if it is the config's; the config's alone, if it names one."""
    if names is None:
        named = has_file or any(each.startswith("method") for each in overrides)
        return [config.method] if named else []
    chosen = [method_class(name.strip()) for name in names.split(",")]
    return [config.method if isinstance(config.method, cls) else cls(**cls.example) for cls in chosen]
