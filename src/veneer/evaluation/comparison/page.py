"""The results of a comparison as one HTML page: no script, nothing from elsewhere, light and dark, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from veneer.evaluation.comparison.analysis import Findings, Line
from veneer.evaluation.comparison.charts import Point, dots, lines, scatter
from veneer.evaluation.comparison.claims import Verdict
from veneer.evaluation.comparison.config import CompareConfig
from veneer.evaluation.comparison.tables import columns, number, summary

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #59636e; --rule: #d8dee4; --card: #f6f8fa;
  --best: #0b62c4; --near: #0b62c4; --behind: #8a929b; --whole: #c2410c; --head: #0f766e; --base: #59636e; }
@media (prefers-color-scheme: dark) { :root { --page: #11151a; --text: #e6e9ed; --quiet: #9aa4af; --rule: #333b44;
  --card: #191f26; --best: #6cb0ff; --near: #6cb0ff; --behind: #7d8691; --whole: #fb923c; --head: #2dd4bf;
  --base: #9aa4af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.lead { font-size: 1.1rem; } code { background: var(--card); padding: 0 .25em; border-radius: 3px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 8px; min-width: 0; }
figure h3 { margin: 0 0 .25rem; font-size: 1rem; } svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
.figures td { white-space: nowrap; } .figures th { min-width: 6rem; }
.figures :is(th, td):first-child { position: sticky; left: 0; background: var(--page); font-weight: 600; }
tr:last-child td { border-bottom: 0; } tr.best td { background: var(--card); }
text { fill: var(--text); font-family: system-ui, sans-serif; } text.tick, text.unit { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--rule); } .whisker { stroke-width: 2; opacity: .6; } .line { fill: none; stroke-width: 2; }
.mark { stroke-width: 2; }
"""
_KINDS = ("best", "near", "behind", "whole", "head", "base")
_COLOURS = "".join(
    f".mark.{kind} {{ fill: var(--{kind if kind != 'near' else 'page'}); stroke: var(--{kind}); }} "
    f".whisker.{kind}, .line.{kind} {{ stroke: var(--{kind}); }}\n"
    for kind in _KINDS
)
_HUES = (212, 24, 140, 330, 265, 55, 180, 0, 95, 290)
"""Of lines that are told apart by a legend."""
_SERIES = "".join(
    f".series{n} {{ stroke: hsl({hue} 70% 42%); }} .mark.series{n} {{ fill: hsl({hue} 70% 42%); }}\n"
    f"@media (prefers-color-scheme: dark) {{ .series{n} {{ stroke: hsl({hue} 75% 66%); }} "
    f".mark.series{n} {{ fill: hsl({hue} 75% 66%); }} }}\n"
    for n, hue in enumerate(_HUES)
)
_INTERVALS = (
    "Intervals are 95 %, over seeds and held-out rows both. Methods are tested against the best one on the same rows, "
    "corrected for being several (Holm): within noise means that these runs do not tell them apart."
)


def page(config: CompareConfig, found: Findings, told: Sequence[Verdict]) -> str:
    """The page."""
    title = f"Comparison on {config.base}" if config.base else "Comparison"
    charts = "".join(_charts(found))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_coded(summary(config, found))}</p>',
        f'<p class="quiet">{_INTERVALS}</p>',
        _legend(),
        f'<div class="charts">{charts}</div>' if charts else "",
        _claims(told),
        "<h2>All figures</h2>",
        _figures(found),
        _notes(config, found),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{_COLOURS}{_SERIES}</style></head>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _charts(found: Findings) -> list[str]:
    there = [line for line in found.lines if line.quality]
    if not there:
        return []
    shown = "g" if found.metric == "loss" else "%"
    better = "less is better" if found.lower_is_better else "more is better"
    told = [_figure("Quality", f"{found.metric} on held-out rows; {better}", dots("Quality", [
        Point(q.mean, 0, line.label, _kind(line), q.low, q.high, _told(line, found))
        for line in there if (q := line.quality)
    ], found.metric, shown=shown))]  # fmt: skip
    for name in dict.fromkeys(name for line in there for name in line.out_of_domain):
        points = [
            Point(q.mean, 0, line.label, _kind(line), q.low, q.high)
            for line in there
            if (q := line.out_of_domain.get(name))
        ]
        told.append(
            _figure(
                f"Rows of another kind: {name}",
                f"{found.metric}; {better}",
                dots(name, points, found.metric, shown=shown),
            )
        )
    pareto = [
        ("Quality and size", "trainable_share", 100.0, "trained, % of the base"),
        ("Quality and time", "seconds", 1.0, "training, s"),
    ]
    pareto += [
        ("Quality and memory", "peak_memory", 1e-9, "peak memory of the process, GB"),
        ("Quality and file", "stored", 1e-6, "stored, MB"),
    ]
    for title, cost, unit, axis in pareto:
        points = [
            Point(value * unit, line.quality.mean, line.label, _kind(line))
            for line in there
            if line.quality and (value := line.costs.get(cost))
        ]
        if len(points) > 1:
            front = _front(points, found.lower_is_better)
            told.append(
                _figure(
                    title,
                    f"None is both better and cheaper than: {', '.join(front)}.",
                    scatter(title, points, axis, found.metric, shown=shown),
                )
            )
    told += _forgetting(found, there, shown)
    return told + _curves(found, there, shown)


def _forgetting(found: Findings, there: Sequence[Line], shown: str) -> list[str]:
    told = []
    name = next((name for line in there for name in line.forgetting), None)
    if name is not None:
        points = [
            Point(q.mean, 0, line.label, _kind(line), q.low, q.high)
            for line in there
            if (q := line.forgetting.get(name))
        ]
        said = f"{name}: less is better. It depends on how far each run learned."
        told.append(_figure("Forgetting, at the end", said, dots("Forgetting", points, name)))
    matched = [line for line in there if line.matched]
    if matched:
        points = []
        for line in matched:
            assert line.matched
            points.append(
                Point(
                    line.matched["forgotten"],
                    0,
                    line.label,
                    _kind(line),
                    line.matched["forgotten"],
                    line.matched["whole"],
                )
            )
        said = "Mark: what the method had forgotten; other end: full fine-tuning, where it had learned equally much."
        told.append(
            _figure("Forgetting, where both are as good", said, dots("Forgetting, matched", points, name or ""))
        )
    return told


def _curves(found: Findings, there: Sequence[Line], shown: str) -> list[str]:
    told = []
    sized = [line for line in there if line.sizes]
    if sized:
        series = [
            (
                line.label,
                f"series{n % len(_HUES)}",
                [
                    Point(size, q.mean, f"{line.label}, {size} rows", f"series{n % len(_HUES)}", q.low, q.high)
                    for size, q in sorted(line.sizes.items())
                ],
            )
            for n, line in enumerate(sized)
        ]
        told.append(
            _figure(
                "By the number of training rows",
                found.metric,
                lines("Rows", series, "training rows", found.metric, shown=shown),
            )
        )
    courses = [line for line in there if len(line.course) > 1]
    if courses:
        series = [
            (
                line.label,
                f"series{n % len(_HUES)}",
                [
                    Point(
                        point["step"], point["loss"], f"{line.label}, step {point['step']}", f"series{n % len(_HUES)}"
                    )
                    for point in line.course
                ],
            )
            for n, line in enumerate(courses)
        ]
        told.append(
            _figure(
                "In the course of training",
                "Validation loss, first seed.",
                lines("Course", series, "step", "validation loss"),
            )
        )
    return told


def _front(points: Sequence[Point], lower_is_better: bool) -> list[str]:
    """Labels of the points that none is better and cheaper than."""
    sign = -1 if lower_is_better else 1
    beaten = [
        p.label for p in points for o in points
        if o.x <= p.x and sign * o.y >= sign * p.y and (o.x < p.x or sign * o.y > sign * p.y)
    ]  # fmt: skip
    return [point.label for point in sorted(points, key=lambda p: p.x) if point.label not in beaten]


def _kind(line: Line) -> str:
    return line.baseline or {"best": "best", "within noise": "near"}.get(line.standing, "behind")


def _told(line: Line, found: Findings) -> str:
    if line.quality is None:
        return line.label
    ends = [number(value, found.metric) for value in (line.quality.mean, line.quality.low, line.quality.high)]
    return f"{line.label}: {ends[0]} ({ends[1]} to {ends[2]}); {line.standing or 'not trained'}"


def _figure(title: str, said: str, svg: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(said)}</figcaption></figure>"


def _legend() -> str:
    names = {
        "best": "best",
        "near": "within noise of it",
        "behind": "behind",
        "whole": "full fine-tuning",
        "head": "head alone",
        "base": "plain base",
    }
    marks = {"whole": "■", "head": "▲", "base": "◆", "near": "○"}
    told = (f'<span style="color: var(--{kind})">{marks.get(kind, "●")}</span> {name}' for kind, name in names.items())
    return f'<p class="quiet">{" &ensp; ".join(told)}</p>'


def _claims(told: Sequence[Verdict]) -> str:
    if not told:
        return ""
    rows = "".join(
        f"<tr><td>{escape(v.claim)}</td><td><strong>{escape(v.verdict)}</strong></td><td>{escape(v.because)}</td></tr>"
        for v in told
    )
    return f'<h2>What is usually claimed, and what was found here</h2><div class="scroll"><table>{rows}</table></div>'


def _figures(found: Findings) -> str:
    shown = columns(found)
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in shown)
    rows = "".join(
        f'<tr class="{_kind(line)}">' + "".join(f"<td>{escape(cells[n])}</td>" for _, cells in shown) + "</tr>"
        for n, line in enumerate(found.lines)
    )
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _notes(config: CompareConfig, found: Findings) -> str:
    notes = [f"<code>{escape(line.label)}</code> failed: {escape(why)}" for line in found.lines for why in line.failed]
    for line in found.lines:
        if line.searched:
            tried = ", ".join(
                f"{rate:g}: {loss:.4f}" if loss is not None else f"{rate:g}: failed"
                for rate, loss in sorted(line.searched.items())
            )
            notes.append(f"Learning rates tried for <code>{escape(line.label)}</code> (validation loss): {tried}")
    if config.power is not None and any(line.costs.get("joules") for line in found.lines):
        notes.append(f"Energy is estimated where the machine does not tell it: time × {config.power:g} W.")
    notes.append("Time, tokens/s and energy are of the training steps alone; memory is the process's peak in training.")
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _coded(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
