"""What a comparison found, from the results of its runs: one summary a line, and who is told apart from whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy

from veneer.evaluation.comparison.ladder import Ladder, ladders
from veneer.evaluation.comparison.runner import Done
from veneer.evaluation.comparison.schedule import IN_DOMAIN, PLAIN
from veneer.evaluation.comparison.statistics import Estimate, Scores, difference, estimate, holm, of_seeds
from veneer.methods import method_class

LOWER_IS_BETTER = ("loss",)
LEVEL = 0.05
"""Below this p, after Holm's correction, two lines are told apart."""
COMMONEST = "commonest answer"
SHARED = ("seconds", "peak_memory", "stored")
"""Costs that are held against full fine-tuning's."""
COSTS = (
    "trainable",
    "trainable_share",
    "stored",
    "peak_memory",
    "seconds",
    "wall_seconds",
    "tokens_per_second",
    "joules",
)


@dataclass(frozen=True)
class Matched:
    """Forgetting where a line and full fine-tuning had learned equally much, over seeds that both have.

    Attributes:
        validation_loss: that both had reached.
        forgotten: by the line until then.
        whole: by full fine-tuning until then.
        less: how much less the line had forgotten, paired by seed.
    """

    validation_loss: float
    forgotten: float
    whole: float
    less: Estimate


@dataclass(frozen=True)
class Line:
    """One entry.

    Attributes:
        label: what it is called.
        baseline: ``base``, ``whole``, ``head``, or None for what is compared with these.
        seeds: runs that count.
        quality: the metric on the held-out rows.
        standing: ``best``, ``within noise`` of the best, ``behind``, ``one seed`` where no more are shared with the
            best, or ``no test`` with a single row.
        over: label of a baseline -> difference to it on the same rows, better is more.
        out_of_domain: name of other held-out rows -> the metric there.
        sizes: training rows -> the metric after training on so many.
        over_whole: ``out_of_domain`` and ``sizes``, by the same names: the difference to full fine-tuning there, on
            the same rows, better is more.
        forgetting: ``DATA, MEASURE`` -> how much is forgotten; more is worse.
        matched: forgetting of this line and of full fine-tuning, where both had learned equally much, or None.
        costs: name -> mean over seeds, or None.
        shares: name of a cost -> as a share of full fine-tuning's, the geometric mean over seeds, paired; p is of 1.
        learning_rate: it took.
        searched: learning rate -> validation loss, of the search.
        course: of the first seed, as the worker noted it.
        failed: what went wrong, a message a run.
    """

    label: str
    baseline: str | None
    seeds: int
    quality: Estimate | None
    standing: str = ""
    over: Mapping[str, Estimate] = field(default_factory=dict)
    out_of_domain: Mapping[str, Estimate] = field(default_factory=dict)
    sizes: Mapping[int, Estimate] = field(default_factory=dict)
    over_whole: Mapping[str | int, Estimate] = field(default_factory=dict)
    forgetting: Mapping[str, Estimate] = field(default_factory=dict)
    matched: Matched | None = None
    costs: Mapping[str, float | None] = field(default_factory=dict)
    shares: Mapping[str, Estimate] = field(default_factory=dict)
    learning_rate: float | None = None
    searched: Mapping[float, float | None] = field(default_factory=dict)
    course: Sequence[Mapping[str, Any]] = ()
    failed: Sequence[str] = ()


@dataclass(frozen=True)
class Findings:
    """What a comparison found.

    Attributes:
        metric: what quality is.
        rows: held-out rows, by the name of their set.
        lines: the best first; those that failed last.
        ladders: methods that were compared at several sizes.
    """

    metric: str
    rows: Mapping[str, int]
    lines: Sequence[Line]
    ladders: Sequence[Ladder] = ()

    @property
    def lower_is_better(self) -> bool:
        """Which way the metric goes."""
        return self.metric in LOWER_IS_BETTER

    def baseline(self, kind: str) -> Line | None:
        """The line that is this baseline, if there is one that came out."""
        return next((line for line in self.lines if line.baseline == kind and line.quality), None)

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        values = asdict(self)
        values["lower_is_better"] = self.lower_is_better
        plain: dict[str, Any] = _finite(values)
        return plain


def analyse(done: Sequence[Done]) -> Findings:
    """What the runs found."""
    by_entry = _by_label(done)
    good = [each for each in done if each.result.get("tests")]
    metric = next((each.result["tests"][IN_DOMAIN]["metric"] for each in good), "loss")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    main = {label: _of_kind(own, "main", "base") for label, own in by_entry.items()}
    scores = {label: _scores(own, IN_DOMAIN) for label, own in main.items()}
    found = {label: score for label, score in scores.items() if score is not None}
    baselines = {label: _baseline(own) for label, own in by_entry.items()}
    standing = _standing({label: s for label, s in found.items() if baselines[label] != "base"}, sign)
    whole = next((label for label, kind in baselines.items() if kind == "whole" and main[label]), None)
    lines = []
    for label, own in by_entry.items():
        over = {
            other: better
            for other, kind in baselines.items()
            if kind and other != label and label in found and other in found
            if (better := _better(found[label], found[other], sign)) is not None
        }
        line = _line(label, own, main[label], baselines[label], standing.get(label, ""), over, metric)
        if whole and whole != label:
            line = replace(
                line,
                matched=_matched(main[label], main[whole]),
                shares=_shares(main[label], main[whole]),
                over_whole=_over_whole(own, by_entry[whole], sign),
            )
        lines.append(line)
    lines.sort(key=lambda line: -sign * line.quality.mean if line.quality else math.inf)
    rows = next(({name: test["rows"] for name, test in each.result["tests"].items()} for each in good), {})
    return Findings(metric, rows, lines, _ladders(by_entry, found, metric in LOWER_IS_BETTER))


def _ladders(
    by_entry: Mapping[str, Sequence[Done]], scores: Mapping[str, Scores], lower_is_better: bool
) -> list[Ladder]:
    def apart(one: str, other: str) -> bool:
        found = difference(scores[one], scores[other])
        return found is None or not found.p >= LEVEL  # one row gives no p at all

    methods = {
        label: own[0].run.spec["config"]["method"] for label, own in by_entry.items() if own[0].run.kind != "base"
    }
    besides = {label: _besides(own) for label, own in by_entry.items()}
    quality = {label: float(score.means.mean()) for label, score in scores.items()}
    return ladders(methods, besides, quality, apart, lower_is_better=lower_is_better)


def _besides(own: Sequence[Done]) -> dict[str, Any]:
    """What an entry's runs were made with besides the method; a rate that was searched for belongs to that."""
    config = next(each.run.spec["config"] for each in own if each.run.kind != "search")
    searched = any(each.run.kind == "search" for each in own)
    train = {key: value for key, value in config.get("train", {}).items() if not (searched and key == "learning_rate")}
    return {**config, "method": None, "train": {**train, "seed": None}}


def _line(
    label: str,
    own: Sequence[Done],
    main: Sequence[Mapping[str, Any]],
    baseline: str | None,
    standing: str,
    over: Mapping[str, Estimate],
    metric: str,
) -> Line:
    names = [name for name in main[0]["tests"] if name != IN_DOMAIN] if main else []
    apart = {name: score for name in names if (score := _scores(main, name)) is not None}
    quality = _scores(main, IN_DOMAIN)
    searched = {each.run.spec["config"]["train"]["learning_rate"]: each for each in own if each.run.kind == "search"}
    sizes = _sizes(own)
    if quality and sizes:
        sizes[main[0]["train_rows"]] = quality
    return Line(
        label,
        baseline,
        len(main),
        _shown(quality, metric) if quality else None,
        standing,
        over,
        {name: _shown(score, metric) for name, score in apart.items()},
        {size: _shown(score, metric) for size, score in sizes.items()},
        forgetting=_forgetting(main),
        costs={name: _mean([run.get(name) for run in main]) for name in COSTS},
        learning_rate=main[0].get("learning_rate") if main else None,
        searched={rate: (each.result.get("after") or {}).get("loss") for rate, each in searched.items()},
        course=main[0].get("course", ()) if main else (),
        failed=list(dict.fromkeys(each.result["error"] for each in own if each.result.get("error"))),
    )


def _by_label(done: Sequence[Done]) -> dict[str, list[Done]]:
    """Runs of each entry, under the name it is shown by: what has a head of its own can't be done by a plain base, for
    which the commonest answer stands."""
    found: dict[str, list[Done]] = {}
    for each in done:
        label = each.run.entry
        if each.run.kind == "base" and each.result.get("head"):
            label = label.replace(PLAIN, COMMONEST, 1)
        found.setdefault(label, []).append(each)
    return found


def _of_kind(own: Sequence[Done], *kinds: str) -> list[dict[str, Any]]:
    return [each.result for each in own if each.run.kind in kinds and not each.result.get("error")]


def _baseline(own: Sequence[Done]) -> str | None:
    if own[0].run.kind == "base":
        return "base"
    return method_class(own[0].run.spec["config"]["method"]["name"]).baseline


def _scores(runs: Sequence[Mapping[str, Any]], name: str) -> Scores | None:
    """``[seeds, rows]``; None if there are none, or they were not scored on the same."""
    tests = [run["tests"][name] for run in runs if name in run["tests"]]
    if not tests or any(test["items"] != tests[0]["items"] for test in tests):
        return None
    seeds = [run["spec"]["seed"] for run in runs if name in run["tests"] and run["spec"]["kind"] != "base"]
    values, items = [test["values"] for test in tests], tests[0]["items"]
    return Scores(numpy.array(values, float), numpy.array(items, float), seeds)


def _better(ours: Scores, theirs: Scores, sign: float) -> Estimate | None:
    """The difference, such that more is better."""
    found = difference(ours, theirs)
    if found is None or sign > 0:
        return found
    return Estimate(-found.mean, -found.high, -found.low, found.p, found.seeds)


def _standing(scores: Mapping[str, Scores], sign: float) -> dict[str, str]:
    """Of each line beside the best one: paired tests on the same rows and seeds, corrected for being several."""
    if not scores:
        return {}
    best = max(scores, key=lambda label: sign * scores[label].means.mean())
    tests = {label: difference(score, scores[best]) for label, score in scores.items() if label != best}
    single = {label: "one seed" for label, test in tests.items() if test is not None and test.seeds == 1}
    tested = {label: test.p for label, test in tests.items() if test is not None and label not in single}
    adjusted = holm({label: p for label, p in tested.items() if math.isfinite(p)})
    found = single | {label: "behind" if p < LEVEL else "within noise" for label, p in adjusted.items()}
    return {best: "best", **{label: found.get(label, "no test") for label in tests}}


def _shown(score: Scores, metric: str) -> Estimate:
    """The metric with its interval, within what a share can be."""
    found = estimate(score)
    if metric in LOWER_IS_BETTER:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _over_whole(own: Sequence[Done], whole: Sequence[Done], sign: float) -> dict[str | int, Estimate]:
    """The difference to full fine-tuning on rows of another kind, and after training on fewer rows."""
    ours, theirs = (_elsewhere(runs) for runs in (own, whole))
    pairs = {name: _better(ours[name], theirs[name], sign) for name in ours if name in theirs}
    return {name: better for name, better in pairs.items() if better is not None}


def _elsewhere(own: Sequence[Done]) -> dict[str | int, Scores]:
    main = _of_kind(own, "main")
    names = [name for name in main[0]["tests"] if name != IN_DOMAIN] if main else []
    apart = {name: score for name in names if (score := _scores(main, name)) is not None}
    return {**apart, **_sizes(own)}


def _shares(ours: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Costs as shares of full fine-tuning's; their logarithms are averaged, so that half and twice cancel."""
    found = {}
    for name in SHARED:
        pairs = [(mine.get(name), theirs.get(name)) for mine, theirs in _paired(ours, whole)]
        logs = [math.log(mine / theirs) for mine, theirs in pairs if mine and theirs]
        if logs:
            log = of_seeds(logs)
            found[name] = replace(log, mean=math.exp(log.mean), low=math.exp(log.low), high=math.exp(log.high))
    return found


def _sizes(own: Sequence[Done]) -> dict[int, Scores]:
    """What was scored, by the number of training rows."""
    found = {}
    for size in sorted({each.run.spec["rows"] for each in own if each.run.kind == "size"}):
        runs = [each.result for each in own if each.run.spec["rows"] == size and not each.result.get("error")]
        if (score := _scores(runs, IN_DOMAIN)) is not None:
            found[size] = score
    return found


def _forgetting(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Means over seeds, such that more is worse; the most telling one first."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for change in (run.get("forgetting") or {}).get("changes", ()):
            sign = 1 if change["measure"] in ("loss", "kl") else -1
            name = f"{change['measure']} on {change['data']}"
            values.setdefault(name, []).append(sign * change["change"]["value"])
    return {name: of_seeds(own) for name, own in values.items()}


def _matched(ours: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> Matched | None:
    """What both forgot until they first reached the validation loss that both did reach, averaged over seeds."""
    pairs = []
    for mine, theirs in _paired(ours, whole):
        courses = [run.get("course") or [] for run in (mine, theirs)]
        if not all(any(point.get("forgotten") is not None for point in course) for course in courses):
            continue
        target = max(min(point["loss"] for point in course) for course in courses)
        if target >= min(course[0]["loss"] for course in courses):
            continue  # one of them learned nothing
        pairs.append((target, *(_reached(course, target) for course in courses)))
    if not pairs:
        return None
    loss, forgotten, by_whole = (fmean(values) for values in zip(*pairs, strict=True))
    less = of_seeds([theirs - mine for _, mine, theirs in pairs])
    return Matched(loss, forgotten, by_whole, less)


def _paired(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Runs of the same seed."""
    others = {run["spec"]["seed"]: run for run in theirs}
    return [(run, others[run["spec"]["seed"]]) for run in ours if run["spec"]["seed"] in others]


def _reached(course: Sequence[Mapping[str, Any]], target: float) -> float:
    """What was forgotten when the loss first fell to ``target``, between validations by a straight line."""
    before = course[0]
    for point in course:
        if point["loss"] <= target:
            fall = before["loss"] - point["loss"]
            share = (before["loss"] - target) / fall if fall > 0 else 1.0
            return float(before["forgotten"] + share * (point["forgotten"] - before["forgotten"]))
        before = point
    raise ValueError("The course never reaches the target.")


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
