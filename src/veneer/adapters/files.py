"""Adapter folders, in peft's layout with ``veneer.json`` beside it.

    adapter_config.json         the method, in peft's words where peft has it
    adapter_model.safetensors   the adapter's state dict, under peft's names
    veneer.json                 what peft has no place for: the base's fingerprint, hashes, task, metrics, versions
    README.md                   the model card; what a person changed in it stays

peft, vLLM, TGI and llama.cpp's converter read the first two; folders peft wrote (without the third) load as well.
"""

from __future__ import annotations

import platform
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.adapters.adapter import PREFIX, Adapter
from veneer.adapters.card import CARD, card
from veneer.adapters.integrity import read_object, read_weights
from veneer.adapters.shapes import PeftConfig, Record, check
from veneer.bases.weights import parameters_of
from veneer.deltas import Replace
from veneer.errors import AdapterError, AdapterFileError, BaseMismatch, OutputError, VeneerError, VeneerWarning
from veneer.methods import Method, method_class, method_from_config
from veneer.methods.peft_config import as_told
from veneer.methods.registry import method_for_peft
from veneer.storage import new_folder, sha256, write_json, write_text

if TYPE_CHECKING:
    from veneer.adapters.base import Base

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "veneer.json"
_FORMAT = 1


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write ``adapter`` to ``folder``, replacing an adapter that is there; all or nothing.

    Raises:
        OutputError: the folder cannot be written; what was there is untouched.
        AdapterError: the folder exists and holds something else.
    """
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).exists():
        raise AdapterError(f"{path} exists and is no adapter folder; give a new or an empty one.")
    with new_folder(path) as new:
        _keep_others(path, new)
        prefix = adapter.method.peft_prefix
        state = {
            (prefix + name.removeprefix(PREFIX) if name.startswith(PREFIX) else name): tensor.detach()
            .cpu()
            .contiguous()
            for name, tensor in adapter.state_dict().items()
        }
        try:
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, to safetensors
            raise OutputError(f"Writing {path} failed ({error}); what was there before is untouched.") from error
        write_json(new / CONFIG, _peft_config(adapter))
        if not (new / CARD).exists():
            write_text(new / CARD, card(adapter, _versions()))
            ours = [WEIGHTS, CONFIG, CARD]
        else:
            ours = [WEIGHTS, CONFIG]
        write_json(new / RECORD, _record(adapter, {name: sha256(new / name) for name in ours}))


def _keep_others(old: Path, new: Path) -> None:
    """Take over what others put into an adapter folder, and a card that a person changed; weights apart."""
    if not old.is_dir():
        return
    try:
        written = read_record(old).get("sha256", {})
    except AdapterFileError:  # it is broken, and about to be replaced
        written = {}
    for path in old.iterdir():
        if path.name in {CONFIG, WEIGHTS, RECORD} or path.suffix in {".bin", ".safetensors"}:
            continue
        if path.name == CARD and written.get(CARD) == sha256(path):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def read_record(folder: str | Path) -> dict[str, Any]:
    """``veneer.json`` of an adapter folder; empty where there is none.

    Raises:
        AdapterFileError: the folder is no adapter folder, or the file is broken.
    """
    path = adapter_folder(folder)
    if not (path / RECORD).exists() and not (path / RECORD).is_symlink():
        return {}
    record = read_object(path / RECORD)
    check(path / RECORD, record, Record)
    return record


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter folder.

    Raises:
        AdapterFileError: the folder is no adapter folder, or the file is broken.
    """
    path = adapter_folder(folder) / CONFIG
    config = read_object(path)
    check(path, config, PeftConfig)
    return config


def weights_hash(folder: str | Path) -> str:
    """Hash of the weights file of an adapter folder.

    Raises:
        AdapterFileError: the folder is no adapter folder, or has no weights.
    """
    path = adapter_folder(folder) / WEIGHTS
    if not path.is_file():
        raise AdapterFileError(f"{path.parent} has no {WEIGHTS}.")
    return sha256(path)


def read_method(folder: str | Path) -> Method:
    """The method of the adapter in a folder; where peft wrote it, with targets as its config has them.

    Raises:
        AdapterFileError: the folder is no adapter folder, or holds one that veneer cannot read.
    """
    path = adapter_folder(folder)
    record, config = read_record(path), read_peft_config(path)
    if "method" in record:
        return method_from_config(record["method"])
    return _method_class(path, config, record).from_peft(config)


def adapter_folder(folder: str | Path) -> Path:
    """The adapter folder meant by ``folder``: itself, or the one inside a training run's folder.

    Raises:
        AdapterFileError: there is none.
    """
    path = Path(folder)
    for candidate in (path, path / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    what = "does not exist" if not path.exists() else f"has no {CONFIG}"
    inside = sorted({found.parent.parent.name for found in path.glob(f"*/adapter/{CONFIG}")}) if path.is_dir() else []
    hint = f" Runs in it: {', '.join(inside)}." if inside else ""
    if saved := sorted(found.parent.name for found in path.glob(f"checkpoint-*/{CONFIG}")):
        hint = f" It holds an unfinished run; of that, {' and '.join(saved)} can be taken."
    raise AdapterFileError(f"{path} is no adapter folder: it {what}.{hint}")


def base_name(folder: str | Path) -> str:
    """The name of the base an adapter folder was made for.

    Raises:
        AdapterFileError: the folder doesn't say.
    """
    path = adapter_folder(folder)
    name = read_record(path).get("base", {}).get("name") or read_peft_config(path).get("base_model_name_or_path")
    if not name:
        raise AdapterFileError(f"{path} does not say which base it is for; load the base and use base.load().")
    return str(name)


def peft_task_type(folder: str | Path) -> str | None:
    """What ``adapter_config.json`` calls the task.

    Raises:
        AdapterFileError: the folder is no adapter folder, or the file is broken.
    """
    return read_peft_config(folder).get("task_type")


def load(base: Base, folder: str | Path, name: str | None = None) -> Adapter:
    """Attach the adapter in ``folder`` to ``base``.

    Raises:
        AdapterFileError: the folder is no intact adapter, or one veneer cannot read.
        BaseMismatch: it was made for another base.
    """
    path = adapter_folder(folder)
    record, config = read_record(path), read_peft_config(path)
    state = read_weights(path / WEIGHTS, record.get("sha256", {}).get(WEIGHTS))
    _check_base(base, path, record)
    cls = _method_class(path, config, record)
    if cls.peft_prefix != PREFIX:
        state = {_under(PREFIX, key, cls.peft_prefix): tensor for key, tensor in state.items()}
    own = (".base_layer.weight", ".base_layer.bias")  # peft writes an adapted embedding's own weight along
    state = {key: tensor for key, tensor in cls.read(state, config).items() if not key.endswith(own)}
    in_full = tuple(config.get("modules_to_save") or ())
    modules = _modules_in_full(state, in_full)
    if record.get("method") and (lost := sorted(set(in_full) - set(modules))):
        raise AdapterFileError(f"{path / WEIGHTS} lacks {', '.join(lost)}, which this adapter trained in full.")
    adapter = base.attach(
        _method(cls, config, record, base, [key for key in state if not _is_in_full(key, in_full)]),
        name or _name(path),
        task=record.get("task", {"peft_task_type": config.get("task_type")}),
        loading=True,
    )
    adapter.record = dict(record.get("training", {}))
    adapter.unsurveyed = False
    try:
        base.train_in_full(adapter, modules)
        _fill(adapter, state, path)
    except VeneerError:
        base.detach(adapter.name)
        raise
    if not acts(adapter):
        warnings.warn(
            f"The adapter in {path} changes nothing: all its deltas are zero. It was saved before it was trained, or "
            "what it trains (the embeddings of some tokens, say) played no part in any row it learned from.",
            VeneerWarning,
            stacklevel=3,
        )
    return adapter


def resume(adapter: Adapter, folder: Path) -> None:
    """Have an attached adapter be of the method and the sizes that its checkpoint in ``folder`` has; what is in it is
    for the caller to fill in.

    Raises:
        AdapterFileError: the checkpoint is not intact.
    """
    adapter.shape_like(read_method(folder), read_weights(folder / WEIGHTS, None))


def acts(adapter: Adapter) -> bool:
    """Whether an adapter changes anything its base computes, a task's head apart. Looks no further than it must."""
    deltas = {path: delta for path, delta in adapter.lower(training=False).items() if not isinstance(delta, Replace)}
    model = adapter.base.model
    with torch.no_grad():
        return not deltas or any(d.changes(parameters_of(model.get_submodule(p))) for p, d in deltas.items())


def restore(adapter: Adapter, folder: Path) -> None:
    """Give an adapter the weights that `save` wrote of it; for what a run wrote itself, and knows to be intact."""
    prefix = adapter.method.peft_prefix
    adapter.load_state_dict({_under(PREFIX, key, prefix): value for key, value in load_file(folder / WEIGHTS).items()})


def _name(path: Path) -> str:
    """A name for the adapter in a folder: the folder's, or its run's, as far as a name may hold it."""
    path = path.resolve()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.parent.name if path.name == "adapter" else path.name) or "adapter"


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    config: dict[str, Any] = {
        "peft_type": adapter.method.peft_type,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
        "modules_to_save": sorted(adapter.modules_in_full) or None,
    }
    fields = adapter.method.to_peft(adapter.sites, adapter.base.sites)
    if any(getattr(site, "parameter", None) and not site.count for site in adapter.sites):
        # peft would act on the modules it can wrap, and leave these out without a word.
        fields["peft_type"] = f"VENEER_{adapter.method.name.upper().replace('-', '_')}"
    return config | {"task_type": adapter.task.get("peft_task_type"), **fields}


def _record(adapter: Adapter, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "class": type(adapter.base.model).__name__,
            "fingerprint": adapter.base.fingerprint,
            "quantized": adapter.base.quantized,
        },
        "method": {"name": adapter.method.name, **adapter.method.model_dump(mode="json")},
        "task": adapter.task,
        "trainable": adapter.trainable,
        "numbers": sum(value.numel() for value in adapter.state_dict().values() if value.is_floating_point()),
        "training": adapter.record,
        "sha256": dict(hashes),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import transformers

    import veneer

    return {
        "veneer": veneer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_base(base: Base, path: Path, record: Mapping[str, Any]) -> None:
    made_for = record.get("base", {})
    if made_for.get("fingerprint", base.fingerprint) != base.fingerprint:
        raise BaseMismatch(
            f"{path} was made for the base {made_for.get('name')!r}, whose weights are not those of "
            f"{base.name!r}. Load that base, or train the adapter anew on this one."
        )
    before, now = made_for.get("quantized"), base.quantized
    if made_for and before != now:
        warnings.warn(
            f"{path} was trained over {made_for.get('name')!r} {_in_bits(before)}, and runs over it {_in_bits(now)} "
            "here: its outputs will differ a little. To have the same, load the base with "
            f"quantize={before!r}.",
            VeneerWarning,
            stacklevel=4,
        )


def _in_bits(quantized: str | None) -> str:
    return f"quantised to {quantized}" if quantized else "unquantised"


def _under(ours: str, key: str, theirs: str) -> str:
    return ours + key.removeprefix(theirs) if key.startswith(theirs) else key


def _method_class(path: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> type[Method]:
    if name := record.get("method", {}).get("name"):
        return method_class(name)
    if (cls := method_for_peft(config)) is None:
        raise AdapterFileError(f"{path} holds a {config.get('peft_type')} adapter, which veneer does not read yet.")
    return cls


def _method(
    cls: type[Method], config: Mapping[str, Any], record: Mapping[str, Any], base: Base, state: Sequence[str]
) -> Method:
    if "method" in record:
        return method_from_config(record["method"])
    # peft's own list of targets may name modules this base lacks; the tensors say where the adapter acts.
    prefixes = {key.removeprefix(PREFIX).rsplit(".", parts)[0] for key in state for parts in (1, 2)}
    sites = [site for site in base.sites.everything if site.path in prefixes]
    if not sites:  # nothing is kept by map
        return as_told(cls, config)
    return cls.from_peft({**config, "target_modules": base.sites.shortest_names(sites)})


def _modules_in_full(state: Mapping[str, Tensor], in_full: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """peft's ``modules_to_save``: names (or ends of paths) of modules, whose parameters the file holds whole."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if _is_in_full(key, in_full):
            found.setdefault(path, {})[leaf] = tensor
    return found


def _is_in_full(key: str, in_full: tuple[str, ...]) -> bool:
    path = key.removeprefix(PREFIX).rpartition(".")[0]
    return any(f".{name}." in f".{path}." for name in in_full)


def _fill(adapter: Adapter, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the file's tensors into the adapter's parameters, which must be the same ones, in the same shapes but for
    those whose sizes the file tells."""
    if adapter.method.sized():
        adapter.shape_like(
            adapter.method, {key: state[key] for key in adapter.keys_of(adapter.method.sized()) & state.keys()}
        )
    own = adapter.state_dict(keep_vars=True)
    wrong = [f"misses {key}" for key in sorted(own.keys() - state.keys())]
    wrong += [f"has {key}, which has no place" for key in sorted(state.keys() - own.keys())]
    for key in sorted(own.keys() & state.keys()):
        here, wanted = state[key], own[key]
        if here.shape != wanted.shape:
            wrong.append(f"has {key} as {list(here.shape)}, not {list(wanted.shape)}")
        elif here.is_floating_point() != wanted.is_floating_point():
            wrong.append(f"has {key} as {here.dtype}, not {wanted.dtype}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise AdapterFileError(
            f"{path} does not fit {type(adapter.base.model).__name__} {adapter.base.name!r}: "
            f"it {'; it '.join(wrong[:3])}{more}. Is it for another base, or for another task?"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    for site in adapter.sites:
        if fault := adapter.method.fault(site, adapter.parameters_at(site.path)):
            raise AdapterFileError(f"{path} is broken at {site.path}: {fault}. Get it again.")
