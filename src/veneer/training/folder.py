"""A run's folder: held by one run at a time, either empty, unfinished or finished, and never taken for another's.

config.yaml, started.json    what the run is of, and the data, base and versions it started with
log.jsonl, checkpoint-120/   while it goes on
report.json, adapter/        in the end; `adapter`, written last, is what makes a run finished
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from veneer.adapters import Adapter
from veneer.errors import BaseMismatch, DataError, OutputError
from veneer.storage import write_json, write_text
from veneer.training import facts
from veneer.training.checkpoints import checkpoints, discard, discard_all_but, intact
from veneer.training.progress import console

ADAPTER, CONFIG, LOG, REPORT, STARTED, LOCK = (
    "adapter", "config.yaml", "log.jsonl", "report.json", "started.json", ".lock",
)  # fmt: skip


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, made if need be; one that nothing was put into is gone afterwards.

    Raises:
        OutputError: it cannot be made or written, or another run is at work in it.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; `output` is to be a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"Another run is at work in {folder}; wait for it, stop it, or choose another `output`."
        ) from None
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {error.strerror or error}. Choose another `output`.") from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # filelock notices if another process has just opened it
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def to_resume(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, if this very run was cut off in ``folder``.

    Raises:
        OutputError: the folder holds a finished run, an unfinished one with another config, or a damaged one.
    """
    if (folder / ADAPTER).exists():
        clear(folder)
        raise OutputError(f"{folder} holds a finished run; choose another `output`, or delete it first.")
    found = checkpoints(folder)
    if not found:
        if (folder / LOG).exists():
            console.print(f"The run in {folder} was cut off before its first checkpoint; it starts anew.")
            (folder / LOG).unlink()
        discard_all_but(folder, set())
        return None
    if other := _differences(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), config):
        raise OutputError(
            f"{folder} holds an unfinished run with another config ({'; '.join(other[:5])}); choose another `output`, "
            "or delete it first."
        )
    while found and not intact(found[-1][1]):
        console.print(f"[yellow]warning:[/yellow] {found[-1][1]} is damaged and left out.")
        discard(found.pop()[1])
    if not found:
        raise OutputError(f"No checkpoint in {folder} is intact any more; delete the folder to start anew.")
    console.print(f"Going on from step {found[-1][0]} of the run in {folder}.")
    return found[-1][1]


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Which keys of a config differ, and how."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys([*before, *now])
        return [
            told
            for name in names
            for told in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if before == now else [f"{key} was {before}, is {now}"]


def start(folder: Path, config: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Note what a run is of."""
    write_text(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
    write_json(folder / STARTED, started)


def check_unchanged(folder: Path, now: Mapping[str, Any]) -> None:
    """Check that a run goes on with what it started with.

    Raises:
        OutputError: the note of it is broken.
        DataError: the data changed since.
        BaseMismatch: the base did.
    """
    try:
        started = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / STARTED} cannot be read ({error}); delete {folder} to start anew.") from error
    check_same(
        started, now, f"the run in {folder} was started", "choose another `output` to train on what is there now"
    )


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], when: str, otherwise: str) -> None:
    """Check data, base, and the adapter continued from; say so if versions differ.

    Raises:
        DataError: the data changed.
        BaseMismatch: the base, the teacher or the adapter continued from did.
    """
    if changed := facts.changed_data(before.get("data", {}), now["data"]):
        raise DataError(f"The data changed since {when}: {changed}. Put back what was there, or {otherwise}.")
    weights = {"base": "base's weights", "continued_from": "adapter that is continued", "teacher": "teacher's weights"}
    for key, what in weights.items():
        if before.get(key) != now.get(key):
            raise BaseMismatch(f"The {what} changed since {when}. Put back what was there, or {otherwise}.")
    if changed := facts.changed_versions(before.get("versions", {}), now["versions"]):
        console.print(f"[yellow]warning:[/yellow] since {when}: {changed}. The result may differ in its last digits.")


def finish(folder: Path, adapter: Adapter, report: Mapping[str, Any]) -> None:
    """Write the report and then the adapter, which makes the run finished."""
    write_json(folder / REPORT, report)
    adapter.save(folder / ADAPTER)
    clear(folder)


def clear(folder: Path) -> None:
    """Delete what is of use only to go on with an unfinished run."""
    discard_all_but(folder, set())
    (folder / STARTED).unlink(missing_ok=True)
