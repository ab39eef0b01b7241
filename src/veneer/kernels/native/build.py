"""Compiling and loading."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from veneer.errors import OutputError
from veneer.storage import cache_dir, locked

_SOURCES = ("native.c", "forms.h")
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-std=gnu11",
)
_WIDEST = "-mprefer-vector-width=512"
"""x86 compilers prefer half of what AVX-512 offers."""
_SECONDS = 120


class _Missing(Exception):
    """Why there is nothing to load."""


_plain: ContextVar[bool] = ContextVar("plain", default=False)


def there() -> bool:
    """Whether the compiled forms are to be used."""
    return not _plain.get() and library() is not None


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside the block they are not."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def state() -> str:
    """For people: that they are there, or why not."""
    return _attempt()[1]


def library() -> ctypes.CDLL | None:
    """The compiled forms, which are compiled first if they never were; None where that can't be done."""
    return _attempt()[0]


@cache
def _attempt() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("VENEER_NATIVE", "1") == "0":
        return None, "turned off by VENEER_NATIVE=0"
    try:
        path = _compiled()
        try:
            return _loaded(path), f"compiled: {path}"
        except OSError:  # a file that was damaged
            path.unlink()
            return _loaded(_compiled()), f"compiled: {path}"
    except (_Missing, OSError, OutputError, subprocess.SubprocessError) as error:
        return None, f"not compiled: {error}"


def _loaded(path: Path) -> ctypes.CDLL:
    """Names that it lacks, OpenMP's, are looked up at once among what torch has loaded."""
    return ctypes.CDLL(str(path))


def _compiled() -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise _Missing("no C compiler found (cc, gcc or $CC)")
    command = [*compiler.split(), *_FLAGS, *([_WIDEST] if platform.machine() == "x86_64" else [])]
    path = cache_dir() / "native" / f"{_key(command)}.so"
    if path.exists():
        return path
    with locked(path):
        if not path.exists():
            _compile(command, path)
    return path


def _key(command: list[str]) -> str:
    """Of all that the object depends on."""
    version = subprocess.run([command[0], "--version"], capture_output=True, timeout=_SECONDS, check=False).stdout
    parts = [version, " ".join(command).encode(), _processor().encode()]
    parts += [Path(__file__).with_name(name).read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> str:
    """Which instructions there are: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "model", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def _compile(command: list[str], path: Path) -> None:
    """Write the object under another name, then put it in its place."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        compiled, linked = Path(folder, "native.o"), Path(folder, "native.so")
        source = Path(__file__).with_name(_SOURCES[0])
        _run([*command, "-c", str(source), "-o", str(compiled)])
        _run([command[0], "-shared", str(compiled), "-o", str(linked)])  # without -fopenmp: torch's own is there
        os.replace(linked, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise _Missing(f"{' '.join(command[:1])} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
