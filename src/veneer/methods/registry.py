"""Methods by name. A file dropped into this folder is found; nothing lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from veneer import methods as package
from veneer.errors import ConfigError, UnknownName, did_you_mean
from veneer.methods.base import Method

DEFAULT = "lora"
"""What a config that names no method trains."""


def methods() -> Mapping[str, type[Method]]:
    """All methods, by name; those defined elsewhere, too, once they are."""
    _import_all()
    found = _leaves(Method)  # type: ignore[type-abstract]
    return {cls.name: cls for cls in sorted(found, key=lambda cls: cls.name)}


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownName: there is none.
    """
    known = methods()
    if name not in known:
        if (found := next((cls for cls in known.values() if name in cls.aliases), None)) is not None:
            return found
        raise UnknownName(
            f"No method called {name!r}.{did_you_mean(name, known)} `veneer methods` lists them: {', '.join(known)}."
        )
    return known[name]


def method_from_config(config: str | Mapping[str, Any] | Method) -> Method:
    """A method from ``"lora"``, ``{"name": "lora", "rank": 8}`` or a method itself.

    Raises:
        ConfigError: no name is given, or a setting is wrong.
        UnknownName: the name is not known.
    """
    if isinstance(config, Method):
        return config
    fields = {"name": config} if isinstance(config, str) else dict(config)
    if "name" not in fields:
        raise ConfigError(f"method: needs a name: one of {', '.join(methods())}.")
    return method_class(str(fields.pop("name")))(**fields)


def method_for_peft(config: Mapping[str, Any]) -> type[Method] | None:
    """The method that this ``adapter_config.json`` is for, if there is one."""
    return next((cls for cls in methods().values() if cls.reads(config)), None)


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _leaves(cls: type[Method]) -> list[type[Method]]:
    found = [cls] if "name" in vars(cls) else []
    for sub in cls.__subclasses__():
        found += _leaves(sub)
    return found
