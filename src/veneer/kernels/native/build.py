"""Compiling and loading."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from veneer.storage import cache_dir, locked

_OPENMP = "-fopenmp"
_SOURCES = ("native.c", "forms.h", "panels.h", "products.h", "thin.h", "low_rank.h", "attention.h", "head.h")
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
    """Inside the block they are not, in this thread."""
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
        return _loaded()
    except Exception as error:  # whatever it is, training goes on without, and the doctor tells
        return None, f"not compiled: {error}"


def _loaded() -> tuple[ctypes.CDLL, str]:
    command = _command()
    path = cache_dir() / "native" / f"{_key(command)}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(path):
        if not path.exists():
            _compile(command, path)
        try:
            found = _opened(path)
        except OSError as error:
            if "undefined symbol" in str(error):  # OpenMP's, of another compiler than torch's
                raise
            path.unlink()  # a file that was damaged
            _compile(command, path)
            found = _opened(path)
    return found, f"compiled: {path}"


def _opened(path: Path) -> ctypes.CDLL:
    """Names that it lacks, OpenMP's, are looked up at once among what torch has loaded."""
    for each in (path, path.parent):
        found = each.stat()
        if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
            raise _Missing(f"{each} can be written by others, so nothing is loaded from it")
    return ctypes.CDLL(str(path))


def _command() -> list[str]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise _Missing("no C compiler found (cc, gcc or $CC)")
    return [*shlex.split(compiler), *_FLAGS, *([_WIDEST] if platform.machine() == "x86_64" else [])]


def _key(command: list[str]) -> str:
    """Of all that the object depends on."""
    parts = [_run([*command, "--version"]), *command, _processor()]
    parts += [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


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
        _run([*command, "-c", str(Path(__file__).with_name(_SOURCES[0])), "-o", str(compiled)])
        unlinked = [each for each in command if each != _OPENMP]  # torch's own is there
        _run([*unlinked, "-shared", str(compiled), "-o", str(linked), "-lm"])
        linked.chmod(0o644)
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    if done.returncode:
        said = [*done.stderr.strip().splitlines(), "no message"][0]
        raise _Missing(f"{command[0]} failed: {said}")
    return done.stdout
