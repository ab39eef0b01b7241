"""Checkpoints of a run: when one is due, written whole or not at all, which of them are kept.

checkpoint-120/
    adapter_config.json, adapter_model.safetensors, veneer.json      an adapter folder
    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json    what else the run goes on from
    complete                                                         the hash of each of them, written last
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from veneer.errors import OutputError
from veneer.storage import publish, sha256, write_json

COMPLETE = "complete"
"""Marker file: all of a checkpoint has been written and synced; holds the hashes of the other files."""
COST = 0.01
"""A checkpoint that is due by time waits until writing them takes less than this share of the run."""
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a folder, oldest first, with their steps."""
    found = [(step_of(path.parent), path.parent) for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written at."""
    return int(checkpoint.name.rpartition("-")[2])


def intact(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are still what was written."""
    try:
        hashes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return all(sha256(checkpoint / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def whole(target: Path, *, writes: bool = True, together: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary folder that becomes the checkpoint ``target``, complete and synced, or vanishes.

    Args:
        target: where the checkpoint goes.
        writes: whether this process is the one, of several, that publishes it.
        together: waits for the other processes.

    Raises:
        OutputError: it cannot be written; the checkpoints there are untouched.
    """
    if not target.parent.is_dir():
        raise OutputError(
            f"The folder {target.parent} has vanished during the run; nothing more can be saved there. "
            "Start the run again, and keep its folder."
        )
    temporary = target.with_name(f".{target.name}.new")
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        together()
        if writes:
            hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / COMPLETE, hashes)
            publish(temporary, target)
        together()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        if isinstance(error, RuntimeError) and "write" not in str(error) and "open file" not in str(error):
            raise
        raise OutputError(
            f"Writing {target} failed ({_cause(error)}). Free some space, or give a folder that can be written; "
            "the checkpoints before it are untouched, and the same command goes on from the last."
        ) from error
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def _cause(error: BaseException) -> str:
    """The innermost cause that says something."""
    while isinstance(error, OutputError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0]


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a kill in between leaves none that looks complete."""
    with contextlib.suppress(OSError):
        (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def discard_all_but(folder: Path, keep: set[int]) -> None:
    """Delete all checkpoints of a run but those of these steps, incomplete ones too."""
    for path in folder.glob("checkpoint-*"):
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) not in keep:
            discard(path)
    for path in folder.glob(".checkpoint-*.new"):  # of a run that was killed while writing it
        shutil.rmtree(path, ignore_errors=True)


class Schedule(transformers.TrainerCallback):
    """Asks for a checkpoint every so many steps or seconds, whatever validations do.

    Args:
        every: steps (an int), or seconds (a float).
        cost: seconds the last checkpoint took to write.
    """

    def __init__(self, every: int | float, cost: Callable[[], float]) -> None:
        self.every, self.cost = every, cost
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save if one is due."""
        if isinstance(self.every, int):
            due = state.global_step % self.every == 0
        else:
            due = time.monotonic() - self._last >= max(self.every, self.cost() / COST)
        control.should_save = control.should_save or due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self._last = time.monotonic()
