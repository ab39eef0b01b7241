"""The results of a comparison as one HTML page: no script, nothing from elsewhere, light and dark, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape

from veneer.evaluation.comparison.analysis import COMMONEST, Findings, Line
from veneer.evaluation.comparison.charts import Point, dots, lines, scatter
from veneer.evaluation.comparison.claims import Verdict
from veneer.evaluation.comparison.config import CompareConfig
from veneer.evaluation.comparison.statistics import Estimate
from veneer.evaluation.comparison.tables import advised, columns, summary, told

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
text { fill: var(--text); font-family: system-ui, sans-serif; }
text.tick, text.unit { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--rule); } .whisker { stroke-width: 2; opacity: .6; } .line { fill: none; stroke-width: 2; }
.mark { stroke-width: 2; }
"""
_KINDS = ("best", "near", "behind", "whole", "head", "base")
_COLOURS = "".join(
    f".mark.{kind} {{ fill: var(--{kind if kind != 'near' else 'page'}); stroke: var(--{kind}); }} "
    f".whisker.{kind}, .line.{kind} {{ stroke: var(--{kind}); }}\n"
    for kind in _KINDS
)
_HUES = (212, 24, 140, 330, 265, 48, 180, 0, 90, 295, 235, 12)
"""Of lines that are told apart by a legend."""
_SERIES = "".join(
    f".series{n} {{ stroke: hsl({hue} 70% 42%); }} .mark.series{n} {{ fill: hsl({hue} 70% 42%); }}\n"
    f"@media (prefers-color-scheme: dark) {{ .series{n} {{ stroke: hsl({hue} 75% 66%); }} "
    f".mark.series{n} {{ fill: hsl({hue} 75% 66%); }} }}\n"
    for n, hue in enumerate(_HUES)
)
_COSTS = (
    ("Quality and size", "trainable_share", 100.0, "trained, % of the base"),
    ("Quality and time", "seconds", 1.0, "training, s"),
    ("Quality and memory", "peak_memory", 1e-9, "peak memory of the process, GB"),
    ("Quality and file", "stored", 1e-6, "stored, MB"),
)
_SAID = {
    "kl": "How far the model is from its base on general texts (KL, nats a token)",
    "similarity": "How far features of general texts have moved (1 − cosine to the base's)",
}
_INTERVALS = (
    "Intervals are 95 %, over seeds and held-out rows both. Methods are tested against the best one on the same rows, "
    "corrected for being several (Holm): within noise means that these runs do not tell them apart."
)


def page(config: CompareConfig, found: Findings, claims: Sequence[Verdict]) -> str:
    """The page."""
    title = f"Comparison on {config.base}" if config.base else "Comparison"
    charts = "".join(_charts(found))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_coded(summary(config, found))}</p>',
        f'<p class="quiet">{_INTERVALS}</p>',
        _legend(),
        f'<div class="charts">{charts}</div>' if charts else "",
        _claims(claims),
        *(f"<p>{_coded(advice)}</p>" for advice in advised(found)),
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
    direction = "less is better" if found.lower_is_better else "more is better"
    figures = [_by_line("Quality", f"{found.metric} on held-out rows; {direction}", found, _marks(there, _quality))]
    for name in dict.fromkeys(name for line in there for name in line.out_of_domain):
        marks = _marks(there, partial(_apart, name))
        figures.append(_by_line(f"Rows of another kind: {name}", f"{found.metric}; {direction}", found, marks))
    figures += [_trade(found, there, *each) for each in _COSTS]
    figures += _forgetting(there)
    return figures + _curves(found, there)


def _quality(line: Line) -> Estimate | None:
    return line.quality


def _apart(name: str, line: Line) -> Estimate | None:
    return line.out_of_domain.get(name)


def _marks(there: Sequence[Line], of: Callable[[Line], Estimate | None]) -> list[Point]:
    """A point for each line that has such an estimate."""
    pairs = [(line, estimate) for line in there if (estimate := of(line)) is not None]
    return [Point(e.mean, 0, line.label, _kind(line), e.low, e.high, line.standing) for line, e in pairs]


def _by_line(title: str, said: str, found: Findings, marks: Sequence[Point]) -> str:
    return _figure(title, said, dots(title, marks, found.metric, shown=_shown(found)))


def _trade(found: Findings, there: Sequence[Line], title: str, cost: str, unit: float, axis: str) -> str:
    """Quality against a cost, and which lines no other beats in both (the Pareto front)."""
    points = [
        Point(value * unit, line.quality.mean, line.label, _kind(line))
        for line in there
        if line.quality and (value := line.costs.get(cost))
    ]
    if len(points) < 2:
        return ""
    front = ", ".join(_front(points, found.lower_is_better))
    said = f"Pareto front (no other is both better and cheaper): {front}."
    return _figure(title, said, scatter(title, points, axis, found.metric, shown=_shown(found)))


def _forgetting(there: Sequence[Line]) -> list[str]:
    figures = []
    name = next((name for line in there for name in line.forgetting), None)
    if name is not None:
        marks = _marks(there, lambda line: line.forgetting.get(name))
        said = f"{_SAID[name.split()[0]]}; less is better. It depends on how far each run learned."
        figures.append(_figure("Forgotten, at the end", said, dots("Forgotten", marks, name)))
    matched = [(line, line.matched) for line in there if line.matched]
    if matched:
        ours = [Point(of.forgotten, 0, line.label, _kind(line)) for line, of in matched]
        whole = [Point(of.whole, 0, f"full fine-tuning, as good as {line.label}", "whole") for line, of in matched]
        said = "Beside each method full fine-tuning (■), both at the validation loss that both reached."
        figures.append(
            _figure("Forgotten, where both are as good", said, dots("Matched", ours, name or "", others=whole))
        )
    return figures


def _curves(found: Findings, there: Sequence[Line]) -> list[str]:
    figures = []
    if sized := [line for line in there if line.sizes]:
        series = [
            _series(n, line, [(size, estimate.mean) for size, estimate in sorted(line.sizes.items())], "rows")
            for n, line in enumerate(sized)
        ]
        drawn = lines("By training rows", series, "training rows", found.metric, shown=_shown(found))
        said = "Means over seeds; the table has the intervals. " + _table_of_sizes(sized, found)
        figures.append(
            f"<figure><h3>By the number of training rows</h3>{drawn}<figcaption>{said}</figcaption></figure>"
        )
    if courses := [line for line in there if len(line.course) > 1]:
        series = [
            _series(n, line, [(point["step"], point["loss"]) for point in line.course], "steps")
            for n, line in enumerate(courses)
        ]
        drawn = lines("Course", series, "step", "validation loss")
        figures.append(_figure("In the course of training", "Validation loss of the first seed.", drawn))
    return figures


def _series(n: int, line: Line, values: Sequence[tuple[float, float]], unit: str) -> tuple[str, str, list[Point]]:
    kind = f"series{n % len(_HUES)}"
    return line.label, kind, [Point(x, y, f"{line.label}, {x:,} {unit}", kind) for x, y in values]


def _table_of_sizes(sized: Sequence[Line], found: Findings) -> str:
    sizes = sorted({size for line in sized for size in line.sizes})
    head = "".join(f"<th>{size:,}</th>" for size in sizes)
    rows = "".join(
        f"<tr><td>{escape(line.label)}</td>"
        + "".join(f"<td>{told(line.sizes.get(size), found.metric)}</td>" for size in sizes)
        + "</tr>"
        for line in sized
    )
    return f'<div class="scroll"><table class="figures"><tr><th></th>{head}</tr>{rows}</table></div>'


def _shown(found: Findings) -> str:
    return "g" if found.metric == "loss" else "%"


def _front(points: Sequence[Point], lower_is_better: bool) -> list[str]:
    """Labels of the points that none is better and cheaper than."""
    sign = -1 if lower_is_better else 1
    beaten = [
        p.label for p in points for o in points
        if o.x <= p.x and sign * o.y >= sign * p.y and (o.x < p.x or sign * o.y > sign * p.y)
    ]  # fmt: skip
    return [point.label for point in sorted(points, key=lambda p: p.x) if point.label not in beaten]


def _kind(line: Line) -> str:
    return line.baseline or (line.standing if line.standing in ("best", "behind") else "near")


def _figure(title: str, said: str, svg: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(said)}</figcaption></figure>"


def _legend() -> str:
    marks = {
        "best": "● best",
        "near": "○ not told from it",
        "behind": "● behind",
        "whole": "■ full fine-tuning",
        "head": "▲ head alone",
        "base": "◆ plain base, or the commonest answer",
    }
    shown = (f'<span style="color: var(--{kind})">{name[0]}</span>{name[1:]}' for kind, name in marks.items())
    return f'<p class="quiet">{" &ensp; ".join(shown)}</p>'


def _claims(claims: Sequence[Verdict]) -> str:
    if not claims:
        return ""
    rows = "".join(
        f"<tr><td>{escape(v.claim)}</td><td><strong>{escape(v.verdict)}</strong></td><td>{escape(v.because)}</td></tr>"
        for v in claims
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
        tried = [
            f"{rate:g}: {f'{loss:.4f}' if loss is not None else 'failed'}"
            for rate, loss in sorted(line.searched.items())
        ]
        if tried:
            rates = f"Learning rates tried for <code>{escape(line.label)}</code> (validation loss)"
            notes.append(f"{rates}: {', '.join(tried)}")
    if any(line.baseline == "base" and line.label.startswith(COMMONEST) for line in found.lines):
        notes.append("A plain base has no head for this task: beside it stands always giving the commonest answer.")
    if config.power is not None and any(line.costs.get("joules") for line in found.lines):
        notes.append(f"Energy is estimated where the machine does not tell it: time × {config.power:g} W.")
    notes.append("Time, tokens/s and energy are of the training steps alone; memory is the process's peak in training.")
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _coded(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
