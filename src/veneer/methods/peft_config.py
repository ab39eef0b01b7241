"""peft's configs as methods of ours.

What peft's config asks for is done or refused by name, never dropped: an option counts as asked for when its value is
not peft's own default. Options that describe the base or the file, not the method, are left aside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import AdapterFileError, ConfigError, UnknownName, did_you_mean
from veneer.methods.base import Method
from veneer.methods.registry import method_for_peft
from veneer.methods.targeted import Targeted

_NOT_OF_THE_METHOD = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",  # told by the module here
    # sizes of the base, which peft writes down when it wraps one
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
    "encoder_hidden_size",
}
_ADVICE = {
    "modules_to_save": "a task's head is trained beside the adapter anyway; other modules: base.attach(modules=...)",
    "target_modules": "this method picks its sites itself; leave it out",
    "feedforward_modules": "this method tells them itself; leave it out",
}
QUERIES_AND_VALUES = ("q", "v")
"""What peft's tables pick for most architectures when no targets are given."""


def from_peft(config: Any) -> Method:
    """The method a config of peft's describes.

    Args:
        config: a ``peft.LoraConfig``, ``IA3Config`` …, or what ``adapter_config.json`` holds (which needs peft to be
            installed, for the defaults of what it leaves out).

    Raises:
        UnknownName: veneer has no such method.
        ConfigError: it is no such config, or asks for something the method does not do; all of it is named.
    """
    values, defaults = _values(config)
    peft_type = _plain(values["peft_type"])
    cls = method_for_peft({**values, "peft_type": peft_type})
    if cls is None:
        raise UnknownName(f"veneer has no method for peft's {peft_type}; `veneer methods` lists what there is.")
    read = cls.peft_checked | set(cls.peft_names) | _NOT_OF_THE_METHOD
    if issubclass(cls, Targeted):
        read |= {"exclude_modules", "layers_to_transform"}
    odd = [name for name, value in values.items() if name not in read and _plain(value) != _plain(defaults.get(name))]
    if odd:
        told = [f"{name} ({_ADVICE[name]})" if name in _ADVICE else name for name in odd]
        raise ConfigError(
            f"peft's {peft_type} config asks for what method {cls.name!r} does not do: {', '.join(told)}. "
            f"`veneer methods {cls.name}` shows its settings."
        )
    try:
        return as_told(cls, values)
    except AdapterFileError as error:
        raise ConfigError(f"{error} `veneer methods {cls.name}` shows what it does.") from error


def as_told(cls: type[Method], values: Mapping[str, Any]) -> Method:
    """The method of this class that a config's values describe, acting where they say.

    Raises:
        AdapterFileError: they ask for something it does not do.
        ConfigError: they pick layers that are no slice.
    """
    if not issubclass(cls, Targeted):
        return cls.from_peft(values)
    method = cls.from_peft({**values, "target_modules": _targets(values.get("target_modules"))})
    exclude = values.get("exclude_modules") or ()
    narrowed = {
        "exclude": (_pattern(exclude),) if isinstance(exclude, str) else tuple(sorted(exclude)),
        "layers": _layers(values.get("layers_to_transform")),
    }
    return type(method)(**{**dict(method), **narrowed})


def _values(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of a config and peft's defaults for them."""
    if isinstance(config, Mapping):
        config = _built(config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type) or not hasattr(config, "peft_type"):
        raise ConfigError(
            f"{type(config).__name__} is no config of peft's; give a LoraConfig or the like, or a mapping with "
            "peft_type as in adapter_config.json."
        )
    values, defaults = {}, {}
    for field in dataclasses.fields(config):
        values[field.name] = getattr(config, field.name)
        make = field.default_factory
        defaults[field.name] = field.default if make is dataclasses.MISSING else make()
    return values, defaults


def _built(config: Mapping[str, Any]) -> Any:
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES
    except ImportError as error:
        raise ConfigError(
            "A mapping leaves out peft's defaults, and peft is not installed: pip install peft; or write the method "
            "itself, e.g. veneer.LoRA(rank=8, alpha=16)."
        ) from error
    if "peft_type" not in config:
        raise ConfigError(f"The mapping has no peft_type, such as LORA; it has {', '.join(config) or 'nothing'}.")
    peft_type = str(_plain(config["peft_type"])).upper()
    if peft_type not in CLASSES:
        raise UnknownName(f"peft knows no peft_type {peft_type!r}.{did_you_mean(peft_type, map(_plain, CLASSES))}")
    cls = CLASSES[peft_type]
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [name for name, value in config.items() if name not in known and _plain(value)]:
        told = [f"{name}.{did_you_mean(name, known)}" for name in unknown]
        raise ConfigError(f"peft's {peft_type} config has no {' '.join(told)}")
    try:
        return cls(**{name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft refuses this {peft_type} config: {error}") from error


def _plain(value: Any) -> Any:
    """Enumerations as the words they stand for; an empty collection is the same as none."""
    value = getattr(value, "value", value)
    return None if isinstance(value, Mapping | list | tuple | set) and not value else value


def _targets(targets: Any) -> str | tuple[str, ...]:
    if targets is None:
        return QUERIES_AND_VALUES
    if isinstance(targets, str):
        return targets if targets == "all-linear" else _pattern(targets)
    return tuple(sorted(targets))


def _pattern(expression: str) -> str:
    """peft matches an expression with the whole path; here it is looked for in the path."""
    return f"/^(?:{expression})$/"


def _layers(chosen: int | Sequence[int] | None) -> str | None:
    """Layers as a slice.

    Raises:
        ConfigError: they do not follow one another.
    """
    indices = [chosen] if isinstance(chosen, int) else sorted(chosen or ())
    if not indices:
        return None
    if indices != list(range(indices[0], indices[-1] + 1)):
        raise ConfigError(
            f"layers_to_transform={indices}: layers are a slice here. Name the modules of these layers by a regular "
            "expression in target_modules instead."
        )
    return f"{indices[0]}:{indices[-1] + 1}"
