"""What there is to say about data, which rows it is about, and what to do.

A `Finding` is an **error** where the adapter, or its scores, would not be what they seem, and a **warning** where
something deserves a look. Training refuses to start over errors; over a leak between training and validation, which
spoils the scores but not the adapter, it warns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy

from veneer.data.part import Part

Level: TypeAlias = Literal["error", "warning"]

_REPEATED = 0.05
"""Share of rows from which on near duplicates are worth a warning."""
_RARE = 0.1
"""Share of an even share of the rows below which a label is rare."""


@dataclass(frozen=True)
class Finding:
    """Something found.

    Attributes:
        level: error or warning.
        code: a word for programs.
        part: training, validation or test.
        message: what it is, which rows, and what to do.
        refused: whether training refuses to start over it.
    """

    level: Level
    code: str
    part: str
    message: str
    refused: bool = False


def lost(part: Part, most: float, context: int | None) -> list[Finding]:
    """Rows cut or left out; an error if their share is more than ``most``."""
    tokens = part.tokens
    if tokens is None or not len(tokens.truncated) + len(tokens.dropped):
        return []
    cut, gone = len(tokens.truncated), len(tokens.dropped)
    rows = len(part.rows)
    parts = []
    if cut:
        parts.append(
            f"{cut:,} of {rows:,} rows {_are(cut)} cut at {tokens.limit:,} tokens ({part.where(tokens.truncated)})"
        )
    if gone:
        parts.append(
            f"{gone:,} of {rows:,} rows {_are(gone)} left out, with a prompt that alone fills {tokens.limit:,} tokens "
            f"({part.where(tokens.dropped)})"
        )
    longest = int((tokens.given + tokens.learned).max())
    message = "; ".join(parts) + f". The longest has {longest:,} tokens: "
    if context is not None and longest > context:
        message += f"shorten or split such rows: the base reads {context:,} at most"
        message += f" (task.max_length is {tokens.limit:,})" if tokens.limit < context else ""
    else:
        message += f"set task.max_length={longest} to keep all whole"
    share = (cut + gone) / rows
    if share > most:
        message += f", or allow it with data.max_truncated={_rounded_up(share)} (it is {most:g})"
        return [Finding("error", "truncated", part.name, message + ".", refused=True)]
    return [Finding("warning", "truncated", part.name, message + ".")]


def beyond(part: Part, context: int | None) -> list[Finding]:
    """Rows the base would be given although they are longer than it reads."""
    tokens = part.tokens
    if tokens is None or context is None:
        return []
    rows = numpy.flatnonzero(numpy.minimum(tokens.given + tokens.learned, tokens.limit) > context)
    if not len(rows):
        return []
    message = (
        f"{_have(rows)} more than the {context:,} tokens the base can read ({part.where(rows)}). "
        f"Shorten or split them, or have them cut with task.max_length={context}."
    )
    return [Finding("error", "beyond_context", part.name, message, refused=True)]


def _rounded_up(share: float) -> float:
    return min(1.0, round(numpy.ceil(share * 100).item() / 100, 2))


def unseen(part: Part, how: str) -> list[Finding]:
    """Rows with labels that can't be learned, or were not."""
    if not part.unknown:
        return []
    labels = Counter(part.unknown.values())
    named = ", ".join(f"{label!r} ({count:,})" for label, count in labels.most_common(10))
    message = (
        f"{_have(part.unknown)} labels that {how}: {named} ({part.where(list(part.unknown))}). "
        "Add what is missing, or take these rows out."
    )
    return [Finding("error", "unseen_labels", part.name, message, refused=True)]


def repeated(part: Part, exact: Sequence[int], near: Sequence[int]) -> list[Finding]:
    """Rows that say what an earlier one says; nearly the same is worth a word only if it is common."""
    found = []
    rows = len(part.rows)
    if exact:
        message = f"{len(exact):,} of {rows:,} rows {_are(len(exact))} equal to an earlier one ({part.where(exact)})."
        found.append(Finding("warning", "exact_duplicates", part.name, message))
    if len(near) > _REPEATED * rows:
        message = (
            f"{len(near):,} of {rows:,} rows {_are(len(near))} nearly equal to an earlier one ({part.where(near)})."
        )
        found.append(Finding("warning", "near_duplicates", part.name, message))
    return found


def leaked(part: Part, exact: Sequence[int], near: Sequence[int]) -> list[Finding]:
    """Held-out rows that ask what a training row asks."""
    found = []
    levels: tuple[tuple[Level, str, Sequence[int], str], ...] = (
        ("error", "overlap", exact, ""),
        ("warning", "near_overlap", near, "nearly "),
    )
    for level, code, rows, how in levels:
        if rows:
            message = (
                f"{len(rows):,} of {len(part.rows):,} rows ask{'s' * (len(rows) == 1)} {how}the same as a training "
                f"row, so scores come out too good ({part.where(rows)}). Take such rows out of either side."
            )
            found.append(Finding(level, code, part.name, message))
    return found


def answers(part: Part, empty: Sequence[int], conflicting: Sequence[int], labels: Counter[str] | None) -> list[Finding]:
    """Answers that are empty or contradict one another, and labels too rare to be learned."""
    found = []
    if conflicting:
        message = (
            f"{_have(conflicting)} the same text as an earlier one, and another label ({part.where(conflicting)})."
        )
        found.append(Finding("warning", "conflicting_labels", part.name, message))
    if empty:
        message = f"{_have(empty)} an empty answer: only its end is learned ({part.where(empty)})."
        found.append(Finding("warning", "empty_answers", part.name, message))
    if labels:
        rare = [
            (label, count) for label, count in labels.items() if count < max(2, _RARE * len(part.rows) / len(labels))
        ]
        if rare:
            named = ", ".join(f"{label!r} ({count:,})" for label, count in sorted(rare, key=lambda of: of[1])[:10])
            message = (
                f"{len(rare):,} of {len(labels):,} labels {_are(len(rare))} rare: {named}; too few rows to learn from."
            )
            found.append(Finding("warning", "rare_labels", part.name, message))
    return found


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _have(rows: Sized) -> str:
    return "1 row has" if len(rows) == 1 else f"{len(rows):,} rows have"
