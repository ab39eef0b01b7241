"""What is to be known of data before it is learned from: sizes, losses, repetitions, leaks, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from veneer.data import duplicates
from veneer.data.findings import Finding, answers, beyond, leaked, lost, repeated, unseen
from veneer.data.formats import TASK, Format, asked_and_answered, detect
from veneer.data.part import Part, Tokens
from veneer.data.reading import each

if TYPE_CHECKING:
    from datasets import Dataset

MAX_TRUNCATED = 0.05
"""Default share of rows that may be cut or left out."""


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
        again, nearly = duplicates.exact(texts.rows), texts.near()
        overlap = [] if first else duplicates.exact(texts.asked, training.asked)
        near_overlap = [] if first else sorted(set(texts.near(training)) - set(overlap))
        conflicting = sorted(set(duplicates.exact(texts.asked)) - set(again)) if texts.labels else []
        reports[part.name] = PartReport(
            rows=len(part.rows),
            **_counted(part.tokens),
            exact_duplicates=len(again),
            near_duplicates=len(nearly),
            near_checked=len(texts.sample),
            empty_answers=len(texts.empty),
            labels=texts.labels and dict(texts.labels.most_common()),
            unseen_labels=dict(Counter(part.unknown.values())),
            conflicting=len(conflicting),
            overlap=None if first else len(overlap),
            near_overlap=None if first else len(near_overlap),
        )
        findings += lost(part, max_truncated, context)
        findings += beyond(part, context)
        findings += unseen(part, "task.labels doesn't name" if first else "are not among those learned")
        findings += repeated(part, again, nearly)
        findings += leaked(part, overlap, near_overlap)
        findings += answers(part, texts.empty, conflicting, texts.labels if first else None)
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
        told = [TASK] if TASK in rows.column_names else []
        for index, row in enumerate(each(rows.select_columns([*format.columns, *told]))):
            asked, answer = asked_and_answered(row, format)
            asked = "\n".join([*(str(row[column]) for column in told), asked])
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
