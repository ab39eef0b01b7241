"""What is usually said of parameter-efficient fine-tuning, and whether a comparison bears it out.

A verdict needs full fine-tuning beside the methods, and an interval: a difference within noise supports "as good as",
never "better", and where no interval is apart from another, there is none. Forgetting and costs are compared by their
means over seeds, and said to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.evaluation.comparison.analysis import Findings, Line
from veneer.evaluation.comparison.statistics import Estimate

SMALL = 0.01
"""The share of trained parameters that is usually promised."""
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
        _as_good(methods, whole),
        _few_rows(found, methods, whole),
        _out_of_domain(found, methods, whole),
        _forgets_less(methods, whole),
        _cheaper("Training is faster.", methods, whole, "seconds", "of its time"),
        _cheaper("Training needs less memory.", methods, whole, "peak_memory", "of its peak memory"),
        _cheaper("An adapter is a small file.", methods, whole, "stored", "of its bytes"),
    ]


def _as_good(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = f"Training less than {SMALL:.0%} of the parameters is about as good as full fine-tuning."
    small = [line for line in methods if (line.costs.get("trainable_share") or 1) < SMALL]
    if not small or whole.label not in small[0].over:
        return Verdict(claim, UNKNOWN, f"No method here trains less than {SMALL:.0%}.")
    good = [line for line in small if line.over[whole.label].high >= 0]
    names = f"{len(good)} of {len(small)} such methods are not shown to be worse"
    return Verdict(claim, _graded(len(good), len(small)), f"{names}{_listed(good)}.")


def _few_rows(found: Findings, methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "With few rows it does better than full fine-tuning."
    sizes = sorted(set(whole.sizes))
    if not sizes:
        return Verdict(claim, UNKNOWN, "Everything was trained on all rows (`sizes` trains on fewer).")
    least, lower = sizes[0], found.lower_is_better
    theirs = whole.sizes[least]
    there = [line for line in methods if least in line.sizes]
    better = [line for line in there if _apart(line.sizes[least], theirs, lower)]
    worse = [line for line in there if _apart(theirs, line.sizes[least], lower)]
    because = (
        f"With {least} rows, the intervals of {len(better)} of {len(there)} methods lie above that of full "
        f"fine-tuning{_listed(better)}, those of {len(worse)} below."
    )
    return Verdict(claim, _graded(len(better), len(there)) if better or worse else UNKNOWN, because)


def _out_of_domain(found: Findings, methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "It does better than full fine-tuning on rows of another kind."
    names = list(whole.out_of_domain)
    if not names:
        return Verdict(claim, UNKNOWN, "There were no such rows (`data.out_of_domain`).")
    lower = found.lower_is_better
    pairs = [(line, name) for line in methods for name in names if name in line.out_of_domain]
    better = [line for line, name in pairs if _apart(line.out_of_domain[name], whole.out_of_domain[name], lower)]
    worse = [line for line, name in pairs if _apart(whole.out_of_domain[name], line.out_of_domain[name], lower)]
    because = (
        f"On {', '.join(names)}, the intervals of {len(better)} of {len(pairs)} lie above that of full "
        f"fine-tuning{_listed(better)}, those of {len(worse)} below."
    )
    return Verdict(claim, _graded(len(better), len(pairs)) if better or worse else UNKNOWN, because)


def _forgets_less(methods: Sequence[Line], whole: Line) -> Verdict:
    claim = "It forgets less of what the base knew."
    matched = {line.label: line.matched for line in methods if line.matched}
    if matched:
        less = [line for line in methods if line.matched and line.matched["forgotten"] < line.matched["whole"]]
        because = f"Where both had learned equally much, {len(less)} of {len(matched)} had forgotten less, by means"
        return Verdict(claim, _graded(len(less), len(matched)), f"{because}{_listed(less)}.")
    return Verdict(claim, UNKNOWN, "Forgetting was not followed through the runs, or their validation loss never fell.")


def _cheaper(claim: str, methods: Sequence[Line], whole: Line, cost: str, of: str) -> Verdict:
    theirs = whole.costs.get(cost)
    shares = {line.label: mine / theirs for line in methods if theirs and (mine := line.costs.get(cost)) is not None}
    if not shares:
        return Verdict(claim, UNKNOWN, "It was not measured.")
    least, most = (pick(shares, key=shares.__getitem__) for pick in (min, max))
    less = [line for line in methods if shares.get(line.label, 2) < 1]
    span = f"from {shares[least]:.2g} {of} ({least}) to {shares[most]:.2g} ({most})"
    because = f"{len(less)} of {len(shares)} methods need less: {span}."
    return Verdict(claim, _graded(len(less), len(shares)), because)


def _apart(better: Estimate, worse: Estimate, lower_is_better: bool) -> bool:
    """Whether two intervals do not overlap, in this order."""
    return better.high < worse.low if lower_is_better else better.low > worse.high


def _graded(held: int, of: int) -> str:
    if held == of:
        return HELD
    return PARTLY if held else FAILED


def _listed(lines: Sequence[Line]) -> str:
    names = list(dict.fromkeys(line.label for line in lines))
    return f" ({', '.join(names)})" if names else ""
