"""Which method to take, from a plan's rows and from what methods were measured to learn; each step by a named rule.

The measurements are those of `benchmarks/learning.py` (one task, MiniLM-L6, 2,000 rows, up to three seeds), kept beside
this file. They say which methods learn at all, and which can't be told apart; they don't say what is best for a task of
another kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from veneer.adapters.facts import facts
from veneer.methods import method_class
from veneer.methods.registry import DEFAULT
from veneer.planning.plan import MethodPlan, Plan

Serving = Literal["one", "many", "merged"]
"""One adapter at a time, many in one batch, or a whole merged model."""
FEW = 500
"""Rows below which what is learned is little enough to fit into little."""


@dataclass(frozen=True)
class Learned:
    """What a method was measured to learn: accuracy with its 95 % interval, and whether it beat a trained head."""

    method: str
    accuracy: float
    low: float
    high: float
    beats_head: bool


@dataclass(frozen=True)
class Reason:
    """A rule that was used.

    Attributes:
        rule: its name.
        text: what it said here.
        rows: the methods it left in.
    """

    rule: str
    text: str
    rows: Sequence[str]


@dataclass(frozen=True)
class Advice:
    """What to take, and why.

    Attributes:
        method: its name; None where nothing is left.
        reasons: the rules, in the order they were used.
    """

    method: str | None
    reasons: Sequence[Reason]


@cache
def learned() -> dict[str, Learned]:
    """The measurements, by method."""
    text = resources.files("veneer.planning").joinpath("learned.json").read_text(encoding="utf-8")
    return {row["method"]: Learned(**row) for row in json.loads(text)}


def advise(plan: Plan, *, rows: int | None = None, serving: Serving = "one") -> Advice:
    """Recommend a method.

    Args:
        plan: its rows are what is chosen among.
        rows: of training data; None where nobody knows.
        serving: how what comes out is to be served.
    """
    chooser = _Chooser(list(plan.methods))
    chooser.keep("fits", "training fits into {memory} with a tenth left free", lambda row: row.fits, plan.memory)
    if serving == "many":
        chooser.keep("many", "rows of one batch can each have their own", lambda row: not row.copies and _mixes(row))
    if serving == "merged":
        chooser.keep("merged", "it folds into the base's weights", lambda row: row.copies or _merges(row))
    chooser.keep("learns", "measured to learn more than a trained head alone", lambda row: _beats(row.method))
    best = max((learned()[row.method].low for row in chooser.left if row.method in learned()), default=0.0)
    chooser.keep("as-good", "not measured to be worse than the best", lambda row: learned()[row.method].high >= best)
    if rows is not None and rows < FEW and chooser.left:
        least = min(row.trainable for row in chooser.left)
        chooser.keep(
            "few-rows",
            f"{rows:,} rows are few: the fewest numbers to train (a rule of thumb, not measured here)",
            lambda row: row.trainable == least,
        )
    elif any(row.method == DEFAULT for row in chooser.left):
        chooser.keep("default", "the form that other tools and servers read, too", lambda row: row.method == DEFAULT)
    elif chooser.left:
        quickest = min(row.seconds_per_step for row in chooser.left)
        chooser.keep("quickest", "the shortest step", lambda row: row.seconds_per_step == quickest)
    return Advice(chooser.left[0].method if chooser.left else None, chooser.reasons)


class _Chooser:
    """Rows that are left, and why."""

    def __init__(self, left: list[MethodPlan]) -> None:
        self.left = left
        self.reasons: list[Reason] = []

    def keep(self, rule: str, text: str, fits: Callable[[MethodPlan], bool], memory: int = 0) -> None:
        """Leave those out that don't fit."""
        from veneer.training.progress import size

        self.left = [row for row in self.left if fits(row)]
        self.reasons.append(Reason(rule, text.format(memory=size(memory)), [row.method for row in self.left]))


def _beats(method: str) -> bool:
    found = learned().get(method)
    return found is not None and found.beats_head


def _mixes(row: MethodPlan) -> bool:
    found = facts(method_class(row.method))
    return found is not None and found.row_mixable


def _merges(row: MethodPlan) -> bool:
    found = facts(method_class(row.method))
    return found is not None and found.mergeable
