"""The retention set: what an adapted model should still know. Written for veneer, Apache-2.0; `general/README.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data import read
from veneer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS, PROMPTS, QUESTIONS = "general texts", "general prompts", "general questions"
"""What the shipped sets are called in reports."""


@dataclass(frozen=True)
class Question:
    """A question with several answers, of which one is right.

    Attributes:
        question: its text.
        choices: the answers.
        answer: index of the right one.
    """

    question: str
    choices: Sequence[str]
    answer: int


def texts() -> Dataset:
    """Short passages of many kinds: `text`."""
    return read(_shipped("texts"))


def prompts() -> Dataset:
    """Everyday prompts with a good answer: `prompt`, `completion`."""
    return read(_shipped("prompts"))


def questions() -> list[Question]:
    """Easy questions with four answers each."""
    return [Question(**row) for row in _shipped("questions")]


def own(sources: Sequence[str | Path]) -> dict[str, Dataset]:
    """A user's own sets, by what they are called in reports.

    Raises:
        DataError: one cannot be read, or is called as another is.
    """
    found: dict[str, Dataset] = {}
    for source in sources:
        name = Path(source).stem
        if name in found or name in (TEXTS, PROMPTS, QUESTIONS):
            raise DataError(f"Two retention sets are called {name!r}; rename the file {source}.")
        found[name] = read(str(source))
    return found


def _shipped(name: str) -> list[dict[str, Any]]:
    text = (files("veneer.evaluation") / "general" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
