"""What is usually said of parameter-efficient fine-tuning, and whether a comparison bears it out.

A verdict needs full fine-tuning beside the methods, two seeds, and an interval of the difference to it: paired by row
and seed where rows are scored, by seed for forgetting, time and memory; shown is what holds after Holm's correction for
several methods. "As good as" is a claim of its own: the whole interval lies above −`MARGIN`. That a difference is not
shown is no evidence that there is none. Sizes of files have no error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from veneer.evaluation.comparison.analysis import LEVEL, Findings, Line
from veneer.evaluation.comparison.statistics import Estimate, holm

SMALL = 0.01
"""The share of trained parameters that is usually promised."""
MARGIN = 0.02
"""How much worse "as good as" may be: of a share so much of 1, of a loss so much of full fine-tuning's."""
LEAST_SECONDS = 5.0
"""Of a training, below which its time is not compared."""
HELD, PARTLY, FAILED, UNKNOWN = "held", "held in part", "did not hold", "not told by this comparison"


@dataclass(frozen=True)
class Verdict:
    """One claim.

    Attributes:
        claim: as it is usually made.
        verdict: ``held``, ``held in part``, ``did not hold``, or ``not told by this comparison``.
        because: what was measured.
    """

    claim: str
    verdict: str
    because: str


def verdicts(found: Findings) -> list[Verdict]:
    """Of all claims this comparison has something to say on."""
    whole = found.baseline("whole")
    methods = [line for line in found.lines if line.baseline is None and line.quality]
    if whole is None or not methods:
        return []
    return [
        _as_good(found, methods, whole),
        _few_rows(methods, whole),
        _out_of_domain(methods, whole),
        _forgets_less(methods, whole),
        _faster(methods, whole),
        _cheaper("Training needs less memory.", methods, "peak_memory", "of its peak memory"),
        _small_file(methods),
    ]


def _as_good(found: Findings, methods: Sequence[Line], whole: Line) -> Verdict:
    claim = f"Training less than {SMALL:.0%} of the parameters is about as good as full fine-tuning."
    over = {line.label: line.over[whole.label] for line in methods if _small(line) and whole.label in line.over}
    if not over or whole.quality is None:
        return Verdict(claim, UNKNOWN, f"No method here trains less than {SMALL:.0%}.")
    margin = MARGIN * (abs(whole.quality.mean) if found.lower_is_better else 1)
    good = [label for label, by in over.items() if by.seeds > 1 and by.low > -margin]
    worse = [label for label, by in over.items() if by.seeds > 1 and by.high < -margin]
    within = f"{MARGIN:.0%} of its loss" if found.lower_is_better else f"{100 * MARGIN:g} points"
    because = (
        f"Of {len(over)} such methods, {len(good)} are shown to be at most {within} worse{_listed(good)}, "
        f"{len(worse)} to be worse by more{_listed(worse)}{_rest(over, good, worse)}."
    )
    return Verdict(claim, _graded(good, worse, len(over)), because)


def _few_rows(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "With few rows it does better than full fine-tuning."
    if not whole.sizes:
        return Verdict(claim, UNKNOWN, "Everything was trained on all rows (`sizes` trains on fewer).")
    least = min(whole.sizes)
    over = {line.label: line.over_whole[least] for line in methods if least in line.over_whole}
    return _better(claim, f"Trained on {least} rows", over)


def _out_of_domain(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "It does better than full fine-tuning on rows of another kind."
    names = list(whole.out_of_domain)
    if not names:
        return Verdict(claim, UNKNOWN, "There were no such rows (`data.out_of_domain`).")
    over = {
        f"{line.label} on {name}" if len(names) > 1 else line.label: line.over_whole[name]
        for line in methods
        for name in names
        if name in line.over_whole
    }
    return _better(claim, f"On {', '.join(names)}", over)


def _better(claim: str, where: str, over: Mapping[str, Estimate]) -> Verdict:
    """By differences on the same rows and seeds."""
    better, worse = _apart(over)
    because = (
        f"{where}, {len(better)} of {len(over)} are shown to be better, row by row{_listed(better)}, {len(worse)} to "
        f"be worse{_listed(worse)}{_rest(over, better, worse)}."
    )
    return Verdict(claim, _graded(better, worse, len(over)), because)


def _forgets_less(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "It forgets less of what the base knew."
    less = {line.label: line.matched.less for line in methods if line.matched}
    if not less:
        why = "Forgetting was not followed through the runs, or their validation loss never fell."
        return Verdict(claim, UNKNOWN, why)
    held, more = _apart(less)
    because = (
        f"Where both had learned equally much, {len(held)} of {len(less)} are shown to have forgotten less, seed by "
        f"seed{_listed(held)}, {len(more)} to have forgotten more{_listed(more)}{_rest(less, held, more)}."
    )
    return Verdict(claim, _graded(held, more, len(less)), because)


def _cheaper(claim: str, methods: Sequence[Line], cost: str, of: str) -> Verdict:
    shares = {line.label: line.shares[cost] for line in methods if cost in line.shares}
    if not shares:
        return Verdict(claim, UNKNOWN, "It was not measured.")
    less, more = _apart({label: _below_one(share) for label, share in shares.items()})
    least, most = (pick(shares, key=lambda label: shares[label].mean) for pick in (min, max))
    because = (
        f"{len(less)} of {len(shares)} are shown to need less, seed by seed, {len(more)} to need more{_listed(more)}: "
        f"from {shares[least].mean:.2g} {of} ({least}) to {shares[most].mean:.2g} ({most})"
        f"{_rest(shares, less, more)}."
    )
    return Verdict(claim, _graded(less, more, len(shares)), because)


def _faster(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "Training is faster."
    times = [seconds for line in (*methods, whole) if (seconds := line.costs.get("seconds")) is not None]
    if times and min(times) < LEAST_SECONDS:
        why = f"Runs of under {LEAST_SECONDS:g} seconds tell more of starting than of training."
        return Verdict(claim, UNKNOWN, why)
    return _cheaper(claim, methods, "seconds", "of its time")


def _small_file(methods: Sequence[Line]) -> Verdict:
    """By means alone: a file's size is the same for each seed."""
    claim = "An adapter is a small file."
    shares = {line.label: line.shares["stored"].mean for line in methods if "stored" in line.shares}
    if not shares:
        return Verdict(claim, UNKNOWN, "It was not measured.")
    least, most = (pick(shares, key=shares.__getitem__) for pick in (min, max))
    less = [label for label, share in shares.items() if share < 1]
    because = (
        f"{len(less)} of {len(shares)} are smaller: from {shares[least]:.2g} of its bytes ({least}) to "
        f"{shares[most]:.2g} ({most})."
    )
    return Verdict(claim, _graded(less, [label for label in shares if label not in less], len(shares)), because)


def _small(line: Line) -> bool:
    return (line.costs.get("trainable_share") or 1) < SMALL


def _below_one(share: Estimate) -> Estimate:
    """How far a share is below 1."""
    return replace(share, mean=1 - share.mean, low=1 - share.high, high=1 - share.low)


def _apart(estimates: Mapping[str, Estimate]) -> tuple[list[str], list[str]]:
    """Those shown to be above 0 and below it, corrected for being several; a single seed shows nothing."""
    tests = {label: each.p for label, each in estimates.items() if each.seeds > 1 and math.isfinite(each.p)}
    shown = [label for label, p in holm(tests).items() if p < LEVEL]
    return [n for n in shown if estimates[n].mean > 0], [n for n in shown if estimates[n].mean < 0]


def _graded(held: Sequence[str], against: Sequence[str], of: int) -> str:
    """``did not hold`` needs no method for it and half of them against it."""
    if of and len(held) == of:
        return HELD
    if held:
        return PARTLY
    return FAILED if against and 2 * len(against) >= of else UNKNOWN


def _rest(estimates: Mapping[str, Estimate], *told: Sequence[str]) -> str:
    """What is said of those that nothing is shown of."""
    rest = [label for label in estimates if not any(label in labels for labels in told)]
    if not rest:
        return ""
    if all(estimates[label].seeds < 2 for label in rest):
        return f"; one seed does not tell of {len(rest)}{_listed(rest)}"
    return f"; the intervals of {len(rest)} are too wide to tell{_listed(rest)}"


def _listed(labels: Sequence[str]) -> str:
    return f" ({', '.join(labels)})" if labels else ""
