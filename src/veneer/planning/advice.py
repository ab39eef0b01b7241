"""Which method to take, from a plan's rows and from what methods were measured to learn; each step by a named rule.

The measurements are those of `benchmarks/learning.py` (one task, MiniLM-L6, 2,000 rows, up to three seeds), kept beside
this file. They say which methods learn at all, and which were measured to be worse than which, by differences paired by
seed and row; what is not told apart is not thereby equal, and nothing is said of tasks of another kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from veneer.adapters.facts import facts
from veneer.methods import method_class
from veneer.methods.registry import DEFAULT
from veneer.planning.plan import HEADROOM, MethodPlan, Plan
from veneer.training.progress import size

Serving = Literal["one", "many", "merged"]
"""One adapter at a time, many in one batch, or a whole merged model."""
FEW = 500
"""Rows below which what is learned is little enough to fit into little."""
LEVEL = 0.05
"""Below it, a difference is taken for one."""


@dataclass(frozen=True)
class Learned:
    """What a method was measured to learn.

    Attributes:
        method: its name.
        accuracy: mean over seeds.
        low: end of its 95 % interval.
        high: the other end.
        beats_head: whether it was measured to beat a trained head alone.
        below: method that scored higher -> difference to it, negative, its 95 % interval, and p of there being none,
            by Holm's procedure over all methods below the same one; paired by seed and row.
    """

    method: str
    accuracy: float
    low: float
    high: float
    beats_head: bool
    below: Mapping[str, tuple[float, float, float, float]]

    def worse_than(self, other: str) -> bool:
        """Whether it was measured to be."""
        return other in self.below and self.below[other][3] < LEVEL

    def gap(self, other: str) -> str:
        """How far it was below, in words: points of accuracy."""
        mean, low, high = (-100 * each for each in self.below[other][:3])
        p = self.below[other][3]
        return f"{self.method} scored {mean:.1f} points below {other} ({high:.1f} to {low:.1f}; adjusted p = {p:.3f})"


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
        reasons: the rules, in the order they were used, up to one that left nothing.
        instead: where nothing is recommended: why, what was left till then, and what to try.
    """

    method: str | None
    reasons: Sequence[Reason]
    instead: str | None = None


@cache
def learned() -> dict[str, Learned]:
    """The measurements, by method, the highest score first."""
    return {row["method"]: Learned(**row) for row in _measured()["methods"]}


def measured_on() -> str:
    """What they were measured on, in words."""
    return str(_measured()["on"])


@cache
def _measured() -> dict[str, Any]:
    text = resources.files("veneer.planning").joinpath("learned.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def advise(plan: Plan, *, rows: int | None = None, serving: Serving = "one") -> Advice:
    """Recommend a method.

    Args:
        plan: its rows are what is chosen among.
        rows: of training data; None where nobody knows.
        serving: how what comes out is to be served.
    """
    chooser = _Chooser(list(plan.methods))
    memory = size(plan.memory)
    if not chooser.keep("fits", f"training fits into {memory} with a tenth left free", lambda row: row.fits):
        return Advice(None, chooser.reasons, _nearest(plan))
    if serving == "many":
        chooser.keep("many", "rows of one batch can each have their own", lambda row: not row.copies and _mixes(row))
    if serving == "merged":
        chooser.keep("merged", "it folds into the base's weights", lambda row: row.copies or _merges(row))
    head = f"measured to learn more than a trained head alone, on {measured_on()}"
    if not chooser.keep("learns", head, lambda row: _beats(row.method)):
        last = chooser.reasons[-1]
        kept = chooser.reasons[-2].rows
        why = (
            f"of what was left ({', '.join(kept)}), nothing is {last.text}"
            if last.rule == "learns"
            else (f"of what was left ({', '.join(kept)}), of nothing is it true that {last.text}")
        )
        if all(row.fits for row in plan.methods):  # more memory would change nothing
            return Advice(None, chooser.reasons, f"Nothing is recommended: {why}. Plan other methods, or another base.")
        return Advice(None, chooser.reasons, f"Nothing is recommended: {why}. {_more_room(plan)}")
    _choose(chooser, rows)
    return Advice(chooser.left[0].method, chooser.reasons)


def _choose(chooser: _Chooser, rows: int | None) -> None:
    """One of those that learn."""
    known = learned()
    left = {row.method for row in chooser.left}
    best = next(name for name in known if name in left)  # by unrounded accuracy
    own = known[DEFAULT]
    told = f"; {own.gap(best)}" if best in own.below and DEFAULT in left else ""
    chooser.keep(
        "not-worse",
        f"not measured to be worse than {best}, which scored highest there (paired by seed; not thereby equal{told})",
        lambda row: not known[row.method].worse_than(best),
    )
    usual = any(row.method == DEFAULT for row in chooser.left)
    if rows is not None and rows < FEW:
        enough = [row for row in chooser.left if not (usual and DEFAULT in known[row.method].below)]
        fewest = min(row.trainable for row in enough)
        scored = f", of those that scored no lower than {DEFAULT} there" if usual else ""
        kept = [row.method for row in enough if row.trainable == fewest]
        kept = [DEFAULT] if usual and DEFAULT in kept else kept
        given_up = f"; given up: {DEFAULT}'s form, which other tools and servers read"
        given_up = given_up if usual and kept != [DEFAULT] else ""
        chooser.keep(
            "few-rows",
            f"{rows:,} rows are few: the fewest numbers to train{scored} (a rule of thumb{given_up})",
            lambda row: row.method in kept,
        )
    elif usual:
        chooser.keep("default", "the form that other tools and servers read, too", lambda row: row.method == DEFAULT)
    else:
        quickest = min(row.seconds_per_step for row in chooser.left)
        chooser.keep("quickest", "the shortest step", lambda row: row.seconds_per_step == quickest)


def _nearest(plan: Plan) -> str:
    """By how much the least misses, and what to try that isn't tried."""
    least = min(plan.methods, key=lambda row: row.train_memory["total"])
    total, usable = least.train_memory["total"], plan.memory * (1 - HEADROOM)
    return (
        f"Nothing fits. Nearest is {least.method}: {size(total)}, {size(total - usable)} more than the {size(usable)} "
        f"to be used; its weights alone are {size(least.train_memory['weights'])}. {_more_room(plan)}"
    )


def _more_room(plan: Plan) -> str:
    """What would take less memory."""
    request = plan.request
    ways = [
        *([] if request.checkpointing else ["train.checkpointing=true"]),
        *(["a smaller train.batch_size"] if request.batch.rows > 1 else []),
        *([] if request.quantize == "nf4" else ["quantize=nf4"]),
        "shorter rows",
    ]
    return f"Try {', '.join(ways)}, or a smaller base."


class _Chooser:
    """Rows that are left, and why; once none are left, no rule is used any more."""

    def __init__(self, left: list[MethodPlan]) -> None:
        self.left = left
        self.reasons: list[Reason] = []

    def keep(self, rule: str, text: str, fits: Callable[[MethodPlan], bool]) -> bool:
        """Leave those out that don't fit; whether any are left."""
        if self.left or not self.reasons:
            self.left = [row for row in self.left if fits(row)]
            self.reasons.append(Reason(rule, text, [row.method for row in self.left]))
        return bool(self.left)


def _beats(method: str) -> bool:
    found = learned().get(method)
    return found is not None and found.beats_head


def _mixes(row: MethodPlan) -> bool:
    found = facts(method_class(row.method))
    return found is not None and found.row_mixable


def _merges(row: MethodPlan) -> bool:
    found = facts(method_class(row.method))
    return found is not None and found.mergeable
