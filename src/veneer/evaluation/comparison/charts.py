"""Charts as SVG, for a page of one file: no script, colours by CSS class, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, _ROW, _FONT = 440, 24, 13.5
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 40
_LABEL, _CHARACTER = 150, 6.6


@dataclass(frozen=True)
class Point:
    """A point with what is known of its error.

    Attributes:
        x: where.
        y: likewise.
        label: what it is.
        kind: CSS class: ``best``, ``near``, ``behind``, ``whole``, ``head``, ``base``.
        low: end of its interval (of y; in `dots` of x).
        high: the other end.
        told: shown when pointed at.
    """

    x: float
    y: float
    label: str
    kind: str
    low: float | None = None
    high: float | None = None
    told: str = ""


@dataclass(frozen=True)
class _Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            steps = [1] if len(powers) > 2 else [1, 2, 5]
            wide = range(math.floor(math.log10(self.low)), powers.stop)
            ticks = [step * 10.0**power for power in wide for step in steps]
        else:
            step = _step((self.high - self.low) / 4)
            ticks = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in ticks if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9) + 1e-12]


def dots(
    title: str, points: Sequence[Point], unit: str, *, shown: str = "g", others: Sequence[Point] | None = None
) -> str:
    """A line for each point, its value on the x axis with its interval, and one to compare it with; in their order."""
    ends = [end for p in [*points, *(others or ())] for end in (p.x, p.low, p.high) if end is not None]
    axis = _axis(ends, _LABEL, WIDTH - _RIGHT)
    height = _TOP + _ROW * len(points) + _BOTTOM
    parts = _grid_x(axis, _TOP, height - _BOTTOM, shown)
    for number, point in enumerate(points):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(_text(_LABEL - 10, y + 4, _short(point.label), "end", "name", ready=True))
        if point.low is not None and point.high is not None:
            parts.append(_line(axis.at(point.low), y, axis.at(point.high), y, f"whisker {point.kind}"))
        if others is not None:
            parts.append(_line(axis.at(point.x), y, axis.at(others[number].x), y, "grid"))
            parts.append(_mark(axis.at(others[number].x), y, others[number]))
        parts.append(_mark(axis.at(point.x), y, point))
    parts.append(_text((_LABEL + WIDTH - _RIGHT) / 2, height - 6, unit, "middle", "unit"))
    return _svg(title, height, parts)


def scatter(title: str, points: Sequence[Point], x: str, y: str, *, shown: str = "g") -> str:
    """Points, named where there is room for the name; x by orders of magnitude where it spans more than one."""
    height = 320
    values = [p.x for p in points]
    wide = min(values) > 0 and max(values) / min(values) > 10
    across = _axis(values, _LEFT, WIDTH - _RIGHT, logarithmic=wide)
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    up = _axis(ends, height - _BOTTOM, _TOP)
    parts = _grid_x(across, _TOP, height - _BOTTOM, "g") + _grid_y(up, shown)
    taken: list[tuple[float, float, float, float]] = [
        (across.at(p.x) - 6, up.at(p.y) - 6, across.at(p.x) + 6, up.at(p.y) + 6) for p in points
    ]
    for point in points:
        left, top = across.at(point.x), up.at(point.y)
        if point.low is not None and point.high is not None:
            parts.append(_line(left, up.at(point.low), left, up.at(point.high), f"whisker {point.kind}"))
        parts.append(_mark(left, top, point))
    parts += [_named(across.at(p.x), up.at(p.y), p.label, taken) for p in points]
    parts += [_text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, x, "middle", "unit"), _text(4, 10, y, "start", "unit")]
    return _svg(title, height, parts)


def lines(title: str, series: Sequence[tuple[str, str, Sequence[Point]]], x: str, y: str, *, shown: str = "g") -> str:
    """A line for each series: its label, its CSS class and its points, which are named in a legend below."""
    height = 320
    legend = _legend([(label, kind) for label, kind, _ in series], height + 6)
    everything = [point for _, _, points in series for point in points]
    across = _axis([p.x for p in everything], _LEFT, WIDTH - _RIGHT, logarithmic=min(p.x for p in everything) > 0)
    up = _axis([p.y for p in everything], height - _BOTTOM, _TOP)
    parts = _grid_x(across, _TOP, height - _BOTTOM, "g") + _grid_y(up, shown)
    for _, kind, points in series:
        path = " ".join(f"{across.at(p.x):.1f},{up.at(p.y):.1f}" for p in points)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for point in points:
            if point.low is not None and point.high is not None:
                parts.append(
                    _line(
                        across.at(point.x), up.at(point.low), across.at(point.x), up.at(point.high), f"whisker {kind}"
                    )
                )
            parts.append(_mark(across.at(point.x), up.at(point.y), point))
    parts += [_text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, x, "middle", "unit"), _text(4, 10, y, "start", "unit")]
    return _svg(title, height + legend[1], parts + legend[0])


def _axis(values: Sequence[float], start: float, end: float, *, logarithmic: bool = False) -> _Axis:
    """With a little room at both ends."""
    low, high = min(values), max(values)
    if logarithmic:
        room = max((high / low) ** 0.08, 1.3)
        return _Axis(low / room, high * room, start, end, True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Axis(low - room, high + room, start, end)


def _step(about: float) -> float:
    power = 10.0 ** math.floor(math.log10(about))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= about)


def _grid_x(axis: _Axis, top: float, bottom: float, shown: str) -> list[str]:
    parts = []
    for tick in axis.ticks():
        at = axis.at(tick)
        parts += [_line(at, top, at, bottom, "grid"), _text(at, bottom + 16, _tick(tick, shown), "middle", "tick")]
    return parts


def _grid_y(axis: _Axis, shown: str) -> list[str]:
    parts = []
    for tick in axis.ticks():
        at = axis.at(tick)
        parts += [
            _line(_LEFT, at, WIDTH - _RIGHT, at, "grid"),
            _text(_LEFT - 6, at + 4, _tick(tick, shown), "end", "tick"),
        ]
    return parts


def _tick(value: float, shown: str) -> str:
    if shown == "%":
        return f"{value * 100:.4g} %"
    if value and (abs(value) >= 1e4 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _mark(x: float, y: float, point: Point) -> str:
    """A circle; baselines have shapes of their own, lest colour alone tells."""
    title = f"<title>{escape(point.told or point.label)}</title>"
    if point.kind == "whole":
        return f'<rect class="mark {point.kind}" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{title}</rect>'
    if point.kind in ("head", "base"):
        corners = ((0, -6), (6, 5), (-6, 5)) if point.kind == "head" else ((0, -6), (6, 0), (0, 6), (-6, 0))
        path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        return f'<polygon class="mark {point.kind}" points="{path}">{title}</polygon>'
    return f'<circle class="mark {point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def _named(x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]) -> str:
    """The name beside, above or below a point, where it hides nothing; nothing where there is no room."""
    width, name = len(label) * _CHARACTER, _short(label)
    for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 18, "middle")):
        left = x + dx - (width if anchor == "end" else width / 2 if anchor == "middle" else 0)
        box = (left, y + dy - 11, left + width, y + dy + 3)
        inside = box[0] > _LEFT and box[2] < WIDTH and box[1] > 0
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            taken.append(box)
            return _text(x + dx, y + dy, name, anchor, "name", ready=True)
    return ""


def _legend(names: Sequence[tuple[str, str]], top: float) -> tuple[list[str], float]:
    parts, x, y = [], float(_LEFT), top + 10
    for label, kind in names:
        width = 22 + len(label) * _CHARACTER
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 20
        parts += [_mark(x + 5, y - 4, Point(0, 0, label, kind)), _text(x + 15, y, label, "start", "name")]
        x += width + 10
    return parts, y - top + 16


def _short(label: str, most: int = 22) -> str:
    return escape(label if len(label) <= most else label[: most - 1] + "…")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str, *, ready: bool = False) -> str:
    content = text if ready else escape(text)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" font-size="{_FONT}">'
    return head + "".join(parts) + "</svg>"
