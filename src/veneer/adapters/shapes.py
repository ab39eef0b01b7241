"""What the JSON files of an adapter folder must look like, as far as it is read; they may come from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from veneer.errors import AdapterFileError


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Data(_Open):
    columns: dict[str, str] | None = None


class _Config(_Open):
    data: _Data = _Data()


class _Training(_Open):
    config: _Config | None = None
    data: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []


class _Base(_Open):
    name: str | None = None
    fingerprint: str = ""
    quantized: str | None = None


class _Task(_Open):
    name: str | None = None


class _Method(_Open):
    name: str


class Record(_Open):
    """``veneer.json``."""

    created: str = ""
    base: _Base = _Base()
    method: _Method | None = None
    task: _Task = _Task()
    training: _Training = _Training()
    trainable: int = 0
    numbers: int | None = None
    sha256: dict[str, str] = {}


class PeftConfig(_Open):
    """``adapter_config.json``."""

    peft_type: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | None = None


def check(path: Path, value: dict[str, Any], shape: type[BaseModel]) -> None:
    """Raises AdapterFileError unless a JSON object has this shape."""
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterFileError(f"{path} is broken: {where} is {first['input']!r}: {first['msg']}.") from error
