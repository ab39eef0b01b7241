"""Checking an adapter folder by itself: everything that can be told without its base, and the rest with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.adapters.card import CARD
from veneer.adapters.files import CONFIG, RECORD, WEIGHTS, adapter_folder, load, read_method, read_record
from veneer.adapters.integrity import inside, read_weights
from veneer.errors import VeneerError, VeneerWarning
from veneer.storage import sha256

if TYPE_CHECKING:
    from veneer.adapters.base import Base

State = Literal["ok", "warning", "error", "unchecked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: it was.
        state: ok, warning, error; or unchecked, where it could not be told.
        note: what is wrong, or what was found.
    """

    what: str
    state: State
    note: str = ""


def verify(folder: str | Path, load_base: Callable[[], Base] | None = None) -> list[Check]:
    """Check an adapter folder.

    Args:
        folder: an adapter folder, or a run's folder.
        load_base: loads the base to check it against, if it is to be.

    Raises:
        AdapterFileError: there is no adapter folder.
        VeneerError: the base cannot be loaded.
    """
    path = adapter_folder(folder)
    checks = [
        _checked("links", lambda: _links(path)),
        _checked("config", lambda: _method(path)),
        _checked("record", lambda: _record(path)),
    ]
    record = read_record(path) if checks[-1].state != "error" else {}
    expected = record.get("sha256", {})
    weights = _checked("weights", lambda: _weights(path, record))
    checks += [weights, _hashes(path, expected)]
    if load_base is None:
        return [*checks, Check("base", "unchecked", "give the base to check fingerprint, shapes and effect")]
    if any(check.state == "error" for check in checks):
        return [*checks, Check("base", "unchecked", "mend the rest first")]
    return [*checks, *_with_base(path, load_base())]


def _checked(what: str, look: Callable[[], Check | str]) -> Check:
    try:
        found = look()
    except VeneerError as error:
        return Check(what, "error", str(error))
    return found if isinstance(found, Check) else Check(what, "ok", found)


def _links(path: Path) -> str:
    files = sorted(path.iterdir())
    for file in files:
        inside(file)
    return f"{len(files)} files, all inside the folder"


def _method(path: Path) -> str:
    method = read_method(path)
    return f"{CONFIG} is read as {method.name}"


def _record(path: Path) -> Check | str:
    if not (path / RECORD).exists():
        return Check("record", "warning", f"no {RECORD}: nothing says what the files and the base should be")
    made = read_record(path)
    return f"made {made.get('created', 'at an unknown time')} for {made.get('base', {}).get('name')}"


def _weights(path: Path, record: dict[str, Any]) -> Check | str:
    state = read_weights(path / WEIGHTS, record.get("sha256", {}).get(WEIGHTS))
    numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    said = f"{len(state)} tensors, {numbers:,} numbers, all finite"
    if record.get("numbers", numbers) != numbers:
        return Check("weights", "error", f"{said}, but {RECORD} tells of {record['numbers']:,}")
    return said


def _hashes(path: Path, expected: dict[str, str]) -> Check:
    if not expected:
        return Check("hashes", "unchecked", "none are recorded")
    changed = [name for name in expected if not (path / name).is_file() or sha256(path / name) != expected[name]]
    if WEIGHTS in changed:
        return Check("hashes", "error", f"{WEIGHTS} is not what was written")
    if CONFIG in changed:
        return Check("hashes", "error", f"{CONFIG} was edited since; others than veneer go by it")
    edited = f" ({CARD} was edited, as it may be)" if changed else ""
    return Check("hashes", "ok", f"as recorded{edited}")


def _with_base(path: Path, base: Base) -> list[Check]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", VeneerWarning)
        try:
            base.detach(load(base, path, "verified").name)
        except VeneerError as error:
            return [Check("base", "error", str(error))]
    idle = [str(each.message) for each in told if issubclass(each.category, VeneerWarning)]
    known = "fingerprint" in read_record(path).get("base", {})
    fits = "fingerprint and shapes fit" if known else "shapes fit; no fingerprint is recorded"
    return [
        Check("base", "ok" if known else "warning", f"{base.name}: {fits}"),
        Check("effect", "warning", idle[0]) if idle else Check("effect", "ok", "it changes what the base computes"),
    ]
