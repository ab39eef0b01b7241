"""Methods by name. A file dropped into this folder is found; nothing lists them.

Another package adds methods by entry points of the group ``veneer.methods``, one for each, named as the method is:

    [project.entry-points."veneer.methods"]
    gain = "their_package.gain:Gain"
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from veneer import methods as package
from veneer.errors import ConfigError, UnknownName, VeneerWarning, did_you_mean
from veneer.methods.base import Method

DEFAULT = "lora"
"""What a config that names no method trains."""
ENTRY_POINTS = "veneer.methods"
"""The group under which other packages offer methods."""


def methods() -> Mapping[str, type[Method]]:
    """All methods, by name: veneer's own, those other packages offer, and those defined elsewhere, once they are."""
    _import_all()
    _offered()
    found = _leaves(Method)  # type: ignore[type-abstract]
    return {cls.name: cls for cls in sorted(found, key=lambda cls: (cls.name, _is_own(cls)))}


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownName: there is none.
    """
    known = methods()
    if name not in known:
        if (found := next((cls for cls in known.values() if name in cls.aliases), None)) is not None:
            return found
        if name in _offered():
            raise UnknownName(f"No method called {name!r}: {_offered()[name]}")
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


@cache
def _offered() -> Mapping[str, str]:
    """Import what other packages offer; what of it can't be used, by name, and why. The rest goes on without it."""
    problems = {point.name: problem for point in entry_points(group=ENTRY_POINTS) if (problem := _load(point))}
    for problem in problems.values():
        warnings.warn(problem, VeneerWarning, stacklevel=2)
    return problems


def _load(point: EntryPoint) -> str | None:
    """Import the class behind an entry point; what is wrong with it, if anything."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an installed package"
    said = f"package {package} offers the method {point.name!r} ({point.value}), which can't be used:"
    help_ = "Update the package, or uninstall it."
    try:
        cls = point.load()
    except Exception as error:  # whatever their module does
        return f"{said} {type(error).__name__}: {error}. {help_}"
    if not (isinstance(cls, type) and issubclass(cls, Method) and getattr(cls, "name", None) == point.name):
        return f"{said} it is no subclass of veneer.Method whose name is {point.name!r}. {help_}"
    own = {name for other in _leaves(Method) if _is_own(other) for name in (other.name, *other.aliases)}  # type: ignore[type-abstract]
    if point.name in own:
        return f"{said} veneer has a method of that name. {help_}"
    return None


def _is_own(cls: type[Method]) -> bool:
    """Whether it is one of veneer's."""
    return cls.__module__.startswith(f"{package.__name__}.")


def _leaves(cls: type[Method]) -> list[type[Method]]:
    found = [cls] if "name" in vars(cls) else []
    for sub in cls.__subclasses__():
        found += _leaves(sub)
    return found
