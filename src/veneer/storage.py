"""Files that are complete or absent: the cache folder, locks, and writes that survive a kill.

Whatever is written goes to a temporary name on the same file system, is synced, and is then renamed into place.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from veneer.errors import OutputError


def cache_dir() -> Path:
    """Where veneer keeps what it fetched: ``$VENEER_CACHE``, else ``$XDG_CACHE_HOME/veneer`` or ``~/.cache/veneer``."""
    if chosen := os.environ.get("VENEER_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an inter-process lock beside ``path``; a second process waits here until the first is done."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing that takes ``path``'s place when the block succeeds, and vanishes when it fails.

    Raises:
        OutputError: it cannot be written; what was there is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"Writing {path} failed ({error}); what was there before is untouched.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or the new, never part of it."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block succeeds and vanishes when it fails.

    An existing ``path`` stays whole until its successor is complete and synced; then the two change places.

    Raises:
        OutputError: ``path`` exists and is not a folder, or its parent cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, but a folder is to be written there; give another path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    except OSError as error:
        raise OutputError(f"Cannot write into {path.parent}: {error.strerror or error}.") from error
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"Writing {path} failed ({error}); what was there before is untouched.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Sync a folder with all that is in it, and put it in the place of ``path``."""
    os.chmod(temporary, 0o755)
    for file in temporary.rglob("*"):
        if file.is_file() and not file.is_symlink():
            os.chmod(file, 0o644)
            _sync(file)
    _sync(temporary)
    if path.exists() and _exchanged(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
    elif path.exists():
        old = temporary.with_name(temporary.name.replace(".new-", ".old-"))
        os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _sync(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Have two folders change places in one step, which no kill can cut in two; False where that can't be done."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
