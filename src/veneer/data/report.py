"""What is to be known of data before it is learned from: sizes, losses, repetitions, leaks, labels.

A `Finding` is an **error** where the adapter, or its scores, would not be what they seem, and a **warning** where
something deserves a look. Training refuses to start over errors; over a leak between training and validation, which
spoils the scores but not the adapter, it warns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy
from numpy.typing import NDArray

from veneer.data import duplicates
from veneer.data.formats import Format, asked_and_answered, detect
from veneer.data.reading import NUMBER, each, places
from veneer.data.records import Place, told

if TYPE_CHECKING:
    from datasets import Dataset

Level: TypeAlias = Literal["error", "warning"]

MAX_TRUNCATED = 0.05
"""Default share of rows that may be cut or left out."""
_RARE = 0.01
_REPEATED = 0.05
"""Shares above which rare labels and repetitions are worth a warning."""
_LISTED = 100


@dataclass(frozen=True)
class Tokens:
    """Tokens of rows before any was cut, and what cutting did.

    Attributes:
        given: ``[rows]``, tokens that are read: of prompts, or of texts to classify.
        learned: ``[rows]``, tokens that carry loss.
        truncated: indices of rows that were cut.
        dropped: indices of rows left out, with nothing to learn after cutting.
        kept: tokens in all after cutting.
        limit: the longest length allowed.
    """

    given: NDArray[Any]
    learned: NDArray[Any]
    truncated: NDArray[Any]
    dropped: NDArray[Any]
    kept: int
    limit: int


@dataclass(frozen=True)
class Lengths:
    """Of all rows, in tokens."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: NDArray[Any]) -> Lengths | None:
        """None if all are zero."""
        if not len(lengths) or not lengths.any():
            return None
        median, p95 = numpy.percentile(lengths, [50, 95], method="higher")
        return cls(int(lengths.min()), int(median), int(p95), int(lengths.max()))

    def __str__(self) -> str:
        return f"{self.min:,}/{self.median:,}/{self.p95:,}/{self.max:,}"


@dataclass(frozen=True)
class Part:
    """Rows to report on.

    Attributes:
        name: training, validation or test.
        rows: numbered ones (see `read`) have their lines told.
        source: what they were read from.
        split: likewise.
        tokens: of them, if they were counted.
        unknown: index of a row -> its label that training doesn't know.
    """

    name: str
    rows: Dataset
    source: Any = None
    split: str = "train"
    tokens: Tokens | None = None
    unknown: Mapping[int, str] = field(default_factory=dict)

    def where(self, indices: Sequence[int] | NDArray[Any]) -> str:
        """These rows for people, by file and line."""
        if self.source is None or NUMBER not in self.rows.column_names:
            return told([Place("the data", "row", int(index) + 1) for index in indices], len(indices))
        numbers = [int(number) for number in self.rows.select(indices[:_LISTED])[NUMBER]]
        found = places(self.source, sorted(numbers), split=self.split)
        return told(found, len(indices))


@dataclass(frozen=True)
class PartReport:
    """What was found in one part; counts are of rows.

    Attributes:
        rows: in all.
        tokens: in all, as they will be learned from, or None.
        prompt: token lengths of what is given, or None.
        completion: token lengths of what is learned, or None.
        truncated: cut at the longest length.
        dropped: left out, with nothing to learn.
        prompt_too_long: with a prompt that alone is longer than the longest length.
        exact_duplicates: equal to an earlier row.
        near_duplicates: nearly equal to an earlier one.
        near_checked: looked at for near duplicates: all, or a sample of very many.
        empty_answers: with an answer of nothing.
        labels: label -> rows, for rows with labels.
        unseen_labels: label -> rows, for labels that training rows don't have.
        conflicting: asking the same as an earlier row, with another label.
        overlap: asking the same as a training row.
        near_overlap: asking nearly the same.
    """

    rows: int
    tokens: int | None
    prompt: Lengths | None
    completion: Lengths | None
    truncated: int | None
    dropped: int | None
    prompt_too_long: int | None
    exact_duplicates: int
    near_duplicates: int
    near_checked: int
    empty_answers: int
    labels: dict[str, int] | None
    unseen_labels: dict[str, int]
    conflicting: int
    overlap: int | None
    near_overlap: int | None


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


@dataclass(frozen=True)
class DataReport:
    """What was found in all parts."""

    format: str
    limit: int | None
    parts: dict[str, PartReport]
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.level == "error"]

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"ok": not self.errors, **asdict(self)}

    def lines(self) -> list[str]:
        """A line or two a part, for people."""
        return [line for name, part in self.parts.items() for line in _lines(name, part, self.limit)]


def report(parts: Sequence[Part], *, max_truncated: float = MAX_TRUNCATED, context: int | None = None) -> DataReport:
    """Report on training rows and those held out.

    Args:
        parts: training first.
        max_truncated: share of a part's rows that may be cut or left out.
        context: the base's longest input in tokens, if known.
    """
    format = detect(parts[0].rows.column_names)
    training = _Texts.of(parts[0].rows, format)
    reports: dict[str, PartReport] = {}
    findings: list[Finding] = []
    for part in parts:
        first = part is parts[0]
        texts = training if first else _Texts.of(part.rows, format)
        repeated, nearly = duplicates.exact(texts.rows), texts.near()
        leaked = None if first else duplicates.exact(texts.asked, training.asked)
        nearly_leaked = None if first else sorted(set(texts.near(training)) - set(leaked or ()))
        asked_again = set(duplicates.exact(texts.asked)) if texts.labels else set()
        conflicting = sorted(asked_again - set(repeated))
        reports[part.name] = PartReport(
            rows=len(part.rows),
            **_counted(part.tokens),
            exact_duplicates=len(repeated),
            near_duplicates=len(nearly),
            near_checked=len(texts.sample),
            empty_answers=len(texts.empty),
            labels=texts.labels and dict(texts.labels.most_common()),
            unseen_labels=dict(Counter(part.unknown.values())),
            conflicting=len(conflicting),
            overlap=None if leaked is None else len(leaked),
            near_overlap=None if nearly_leaked is None else len(nearly_leaked),
        )
        if part.tokens is not None:
            findings += _lost(part, part.tokens, max_truncated, context)
            findings += _beyond(part, part.tokens, context)
        findings += _unseen(part)
        findings += _repeated(part, repeated, nearly)
        findings += _leaked(part, leaked or [], nearly_leaked or [], trained_on=parts[0].name)
        findings += _answers(part, texts.empty, conflicting, texts.labels if first else None)
    limit = parts[0].tokens.limit if parts[0].tokens else None
    return DataReport(format.name.lower(), limit, reports, findings)


@dataclass(frozen=True)
class _Texts:
    """What a pass over the rows of a part brings; the texts themselves are kept of a sample only."""

    rows: list[bytes]
    asked: list[bytes]
    empty: list[int]
    labels: Counter[str] | None
    sample: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, rows: Dataset, format: Format) -> _Texts:
        wanted = set(duplicates.sample(len(rows)))
        result = cls([], [], [], Counter() if format is Format.TEXT_LABEL else None, {})
        for index, row in enumerate(each(rows.select_columns(format.columns))):
            asked, answer = asked_and_answered(row, format)
            result.rows.append(duplicates.digest(f"{asked}\0{answer}"))
            result.asked.append(duplicates.digest(asked))
            if format is not Format.TEXT and not answer.strip():
                result.empty.append(index)
            if result.labels is not None:
                result.labels[answer] += 1
            if index in wanted:
                result.sample[index] = (asked, answer)
        return result

    def near(self, training: _Texts | None = None) -> list[int]:
        """Rows nearly equal to an earlier one; or asking nearly the same as one of training."""
        if training is None:
            found = duplicates.near(["\n".join(pair) for pair in self.sample.values()])
        else:
            asked, known = ([pair[0] for pair in of.sample.values()] for of in (self, training))
            found = duplicates.near(asked, known)
        indices = list(self.sample)
        return sorted(indices[place] for place in found)


def _counted(tokens: Tokens | None) -> dict[str, Any]:
    if tokens is None:
        return dict.fromkeys(("tokens", "prompt", "completion", "truncated", "dropped", "prompt_too_long"))
    too_long = (tokens.learned > 0) & (tokens.given >= tokens.limit)
    return {
        "tokens": tokens.kept,
        "prompt": Lengths.of(tokens.given),
        "completion": Lengths.of(tokens.learned),
        "truncated": len(tokens.truncated),
        "dropped": len(tokens.dropped),
        "prompt_too_long": int(too_long.sum()),
    }


def _lost(part: Part, tokens: Tokens, most: float, context: int | None) -> list[Finding]:
    cut, gone = len(tokens.truncated), len(tokens.dropped)
    if not cut + gone:
        return []
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


def _beyond(part: Part, tokens: Tokens, context: int | None) -> list[Finding]:
    """Rows the base would be given although they are longer than it reads."""
    if context is None or tokens.limit <= context:
        return []
    beyond = numpy.flatnonzero(numpy.minimum(tokens.given + tokens.learned, tokens.limit) > context)
    if not len(beyond):
        return []
    message = (
        f"{_have(beyond)} more than the {context:,} tokens the base can read ({part.where(beyond)}). "
        f"Shorten or split them, or have them cut with task.max_length={context}."
    )
    return [Finding("error", "beyond_context", part.name, message, refused=True)]


def _rounded_up(share: float) -> float:
    return min(1.0, round(numpy.ceil(share * 100).item() / 100, 2))


def _unseen(part: Part) -> list[Finding]:
    if not part.unknown:
        return []
    labels = Counter(part.unknown.values())
    named = ", ".join(f"{label!r} ({count:,})" for label, count in labels.most_common(10))
    message = (
        f"{_have(part.unknown)} labels that training rows don't: {named} ({part.where(list(part.unknown))}). "
        "Add training rows with them, or take them out."
    )
    return [Finding("error", "unseen_labels", part.name, message, refused=True)]


def _repeated(part: Part, exact: Sequence[int], near: Sequence[int]) -> list[Finding]:
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


def _leaked(part: Part, exact: Sequence[int], near: Sequence[int], trained_on: str) -> list[Finding]:
    found = []
    for code, level, rows, how in (("overlap", "error", exact, ""), ("near_overlap", "warning", near, "nearly ")):
        if rows:
            message = (
                f"{len(rows):,} of {len(part.rows):,} rows ask{'s' * (len(rows) == 1)} {how}the same as a {trained_on} "
                f"row, so scores come out too good ({part.where(rows)}). Take such rows out of either side."
            )
            found.append(Finding("error" if level == "error" else "warning", code, part.name, message))
    return found


def _answers(
    part: Part, empty: Sequence[int], conflicting: Sequence[int], labels: Counter[str] | None
) -> list[Finding]:
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
        rare = [(label, count) for label, count in labels.items() if count < max(2, _RARE * len(part.rows))]
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


def _lines(name: str, part: PartReport, limit: int | None) -> list[str]:
    told = [f"{name:<11}{part.rows:,} row{'s' * (part.rows != 1)}"]
    if part.prompt or part.completion:
        lengths = [f"{what} {of}" for what, of in (("prompt", part.prompt), ("completion", part.completion)) if of]
        if len(lengths) == 1:
            lengths = [lengths[0].partition(" ")[2]]
        told.append(f"{part.tokens:,} tokens: {', '.join(lengths)} a row (min/median/95 %/max)")
    if part.truncated is not None:
        cut = f"{part.truncated:,} cut, {part.dropped:,} left out at {limit:,} tokens"
        told.append(cut if part.truncated or part.dropped else "none cut")
    lines = [" · ".join(told)]
    counts = {
        "exact duplicates": part.exact_duplicates,
        "near duplicates": part.near_duplicates,
        "empty answers": part.empty_answers,
        "with conflicting labels": part.conflicting,
        "also in training": part.overlap or 0,
        "nearly in training": part.near_overlap or 0,
    }
    more = [f"{count:,} {what}" for what, count in counts.items() if count]
    if part.labels:
        shown = [f"{label} {count / part.rows:.0%}" for label, count in list(part.labels.items())[:6]]
        rest = len(part.labels) - len(shown)
        more.append("labels: " + ", ".join(shown) + (f" and {rest} more" if rest else ""))
    return [*lines, " " * 11 + " · ".join(more)] if more else lines
