"""The results of a comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from veneer.evaluation.comparison.analysis import Findings, Line
from veneer.evaluation.comparison.claims import Verdict
from veneer.evaluation.comparison.config import CompareConfig
from veneer.evaluation.comparison.statistics import Estimate
from veneer.training.progress import duration, size

FEW = 3
"""Below so many seeds, readers are warned."""
Columns = Sequence[tuple[str, Sequence[str]]]
"""Titles, and a cell a line."""


def plain(config: CompareConfig, found: Findings, claims: Sequence[Verdict]) -> dict[str, Any]:
    """Everything, for ``results.json``."""
    return {
        "config": config.model_dump(mode="json"),
        **found.plain(),
        "claims": [asdict(verdict) for verdict in claims],
    }


def columns(found: Findings) -> Columns:
    """The table for people. Columns in which no line has anything are left out."""
    baselines = [found.baseline(kind) for kind in ("whole", "head", "base")]
    forgotten = list(dict.fromkeys(name for line in found.lines for name in line.forgetting))
    apart = list(dict.fromkeys(name for line in found.lines for name in line.out_of_domain))
    lines, metric = found.lines, found.metric
    wanted = [
        ("", [line.label for line in lines]),
        (metric, [told(line.quality, metric) for line in lines]),
        ("standing", [line.standing for line in lines]),
        *((f"better than {b.label} by", [_over(line, b, metric) for line in lines]) for b in baselines if b),
        *((f"{metric} on {n}", [told(line.out_of_domain.get(n), metric) for line in lines]) for n in apart),
        *((f"forgotten: {name}", [_forgotten(line, name) for line in lines]) for name in forgotten),
        ("forgotten, full fine-tuning, when as good", [_matched(line) for line in found.lines]),
        ("trained", [_share(line.costs.get("trainable_share")) for line in found.lines]),
        ("stored", [_cost(line, "stored", size) for line in found.lines]),
        ("peak memory", [_cost(line, "peak_memory", size) for line in found.lines]),
        ("time", [_cost(line, "seconds", _time) for line in found.lines]),
        ("tokens/s", [_cost(line, "tokens_per_second", lambda n: f"{n:,.0f}") for line in found.lines]),
        ("energy", [_cost(line, "joules", lambda joules: f"{joules / 3600:.2g} Wh") for line in found.lines]),
        ("learning rate", [f"{line.learning_rate:g}" if line.learning_rate else "" for line in found.lines]),
        ("seeds", [str(line.seeds) if line.baseline != "base" else "" for line in found.lines]),
    ]
    return [(title, cells) for title, cells in wanted if any(cells)]


def to_csv(found: Findings) -> str:
    """A line each, numbers as they are."""
    file = io.StringIO()
    rows = [_flat(line) for line in found.lines]
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(config: CompareConfig, found: Findings, claims: Sequence[Verdict]) -> str:
    """The table, and what it says in words."""
    shown = columns(found)
    cells = zip(*(own for _, own in shown), strict=True)
    parts = ["# Comparison", summary(config, found), _table([title for title, _ in shown], cells)]
    if sizes := sorted({size for line in found.lines for size in line.sizes}):
        there = [line for line in found.lines if line.sizes]
        rows = [[line.label, *(told(line.sizes.get(n), found.metric) for n in sizes)] for line in there]
        parts += ["## By the number of training rows", _table(["", *map(str, sizes)], rows)]
    if claims:
        rows = [[verdict.claim, f"**{verdict.verdict}**", verdict.because] for verdict in claims]
        parts += ["## What is usually claimed", _table(["claim", "", "here"], rows)]
    parts += [f"Size: {advice}" for advice in advised(found)]
    failed = [f"- `{line.label}`: {why}" for line in found.lines for why in line.failed]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def summary(config: CompareConfig, found: Findings) -> str:
    """Who is best, and who is not told apart from it, in a few sentences."""
    best = next((line for line in found.lines if line.standing == "best"), None)
    rows = ", ".join(f"{count:,} held-out rows of {name}" for name, count in found.rows.items())
    about = f"{config.base or 'several bases'}; {config.seeds} seed{'s' if config.seeds > 1 else ''}; {rows}."
    if best is None or best.quality is None:
        return f"{about} No run has finished yet."
    near = [line.label for line in found.lines if line.standing == "within noise"]
    lead = f"`{best.label}` has the best {found.metric}, {told(best.quality, found.metric)}"
    if near:
        names = ", ".join(f"`{name}`" for name in near)
        lead += f", but {names} {'is' if len(near) == 1 else 'are'} within noise of it"
    if few := [line for line in found.lines if line.baseline != "base" and line.seeds < config.seeds]:
        lead += f"; seeds that count: {', '.join(f'`{line.label}` {line.seeds} of {config.seeds}' for line in few)}"
    base = found.baseline("base")
    if base is not None and found.lines.index(base) < found.lines.index(best):
        lead += f"; the {base.label} itself does better"
    if best.seeds < 2:
        lead += "; with a single seed, other seeds may tell another story"
    elif best.seeds < FEW:
        lead += "; with two seeds, intervals are wide and rest on how far two runs happen to lie apart: take three"
    return f"{about} {lead}."


def advised(found: Findings) -> list[str]:
    """How large the methods that were compared at several sizes need to be."""
    told = []
    for ladder in found.ladders:
        sizes = ", ".join(f"{size:g}" for size in ladder.sizes)
        limit = number(ladder.limit, found.metric) if ladder.limit is not None else None
        told.append(
            f"`{ladder.method}` with {ladder.setting} {ladder.advised:g} is the smallest not told from the best of "
            f"{sizes}." + (f" A power law fitted to them levels off at {limit}." if limit else "")
        )
    return told


def number(value: float, metric: str) -> str:
    """A metric's value: a share as per cent, a loss as it is."""
    return f"{value:.4f}" if metric == "loss" else f"{value:.1%}"


def told(value: Estimate | None, metric: str) -> str:
    """An estimate with its interval."""
    if value is None:
        return ""
    return f"{number(value.mean, metric)} ({number(value.low, metric)} to {number(value.high, metric)})"


def _over(line: Line, other: Line, metric: str) -> str:
    value = line.over.get(other.label)
    if value is None:
        return ""
    sign = "+" if value.mean >= 0 else "−"
    low, high = (f"{'+' if end >= 0 else '−'}{number(abs(end), metric)}" for end in (value.low, value.high))
    single = ", one seed" if value.seeds < 2 else ""
    return f"{sign}{number(abs(value.mean), metric)} ({low} to {high}{single})"


def _forgotten(line: Line, name: str) -> str:
    value = line.forgetting.get(name)
    if value is None:
        return ""
    return f"{value.mean:.3f}" + (f" ({value.low:.3f} to {value.high:.3f})" if value.seeds > 1 else "")


def _matched(line: Line) -> str:
    return f"{line.matched.forgotten:.3f}, {line.matched.whole:.3f}" if line.matched else ""


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 59.95 else duration(seconds)


def _share(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 100:.2g} %" if value < 0.995 else f"{value * 100:.0f} %"


def _cost(line: Line, name: str, shown: Any) -> str:
    value = line.costs.get(name)
    return "" if value is None else str(shown(value))


def _flat(line: Line) -> dict[str, Any]:
    row: dict[str, Any] = {"label": line.label, "baseline": line.baseline or "", "standing": line.standing}
    row |= {"seeds": line.seeds, "learning_rate": line.learning_rate}
    groups: list[tuple[str, Mapping[Any, Estimate | None]]] = [("quality", {"": line.quality}), ("over", line.over)]
    groups += [("out_of_domain", line.out_of_domain), ("rows", line.sizes), ("forgotten", line.forgetting)]
    for group, estimates in groups:
        for name, value in estimates.items():
            if value is not None:
                prefix = f"{group} {name}".strip()
                row |= {prefix: value.mean, f"{prefix} low": value.low, f"{prefix} high": value.high}
    if line.matched:
        values = asdict(line.matched)
        less = values.pop("less")
        row |= {f"matched {name}": value for name, value in values.items()}
        row |= {"matched less": less["mean"], "matched less low": less["low"], "matched less high": less["high"]}
    return row | dict(line.costs) | {"failed": "; ".join(line.failed)}


def _table(titles: Sequence[str], rows: Any) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
