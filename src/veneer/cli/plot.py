"""A curve over a logarithmic axis, as plain characters and as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence


def text_plot(
    xs: Sequence[float], ys: Sequence[float], marks: Mapping[str, float], *, width: int = 72, height: int = 14
) -> str:
    """``ys`` over ``xs`` (positive, logarithmic), a dot a point; a line of marks below, a letter at its place each."""
    low, high = _range(ys)
    column = _place(xs, width - 1)
    grid = [[" "] * width for _ in range(height)]
    for x, y in zip(xs, ys, strict=True):
        level = (min(y, high) - low) / (high - low)
        grid[height - 1 - round(level * (height - 1))][column(x)] = "*"
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    lines = [f"{labels.get(index, ''):>8} |{''.join(row).rstrip()}" for index, row in enumerate(grid)]
    axis, below = ["-"] * width, [" "] * width
    for name, x in marks.items():
        axis[column(x)], below[column(x)] = "+", name[0]
    first, last = f"{xs[0]:.1e}", f"{xs[-1]:.1e}"
    return "\n".join(
        [
            *lines,
            f"{'':8} +{''.join(axis)}",
            f"{'':8}  {''.join(below).rstrip()}",
            f"{'':8}  {first}{last:>{width - len(first)}}",
        ]
    )


def svg_plot(
    xs: Sequence[float],
    ys: Sequence[float],
    smooth: Sequence[float],
    marks: Mapping[str, float],
    *,
    title: str,
    size: tuple[int, int] = (720, 400),
) -> str:
    """The same as a picture: points ``ys``, the line ``smooth``, a labelled vertical line for each mark."""
    width, height = size
    left, right, top, bottom = 60, width - 20, 40, height - 50
    low, high = _range(smooth)
    column = _place(xs, right - left)

    def at(x: float, y: float) -> str:
        level = (min(max(y, low), high) - low) / (high - low)
        return f"{left + column(x)},{bottom - level * (bottom - top):.1f}"

    dots = "".join(
        '<circle cx="{}" cy="{}" r="2" fill="#aab"/>'.format(*at(x, y).split(",")) for x, y in zip(xs, ys, strict=True)
    )
    line = " ".join(at(x, y) for x, y in zip(xs, smooth, strict=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{html.escape(title)}</text>',
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="#333"/>',
        dots,
        f'<polyline points="{line}" fill="none" stroke="#2a5db0" stroke-width="2"/>',
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">{low:.3g}</text>',
    ]
    for power in range(math.ceil(math.log10(xs[0])), math.floor(math.log10(xs[-1])) + 1):
        x = left + column(10.0**power)
        parts.append(f'<path d="M{x},{bottom} v5" stroke="#333"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">1e{power}</text>')
    parts.append(f'<text x="{(left + right) // 2}" y="{height - 12}" text-anchor="middle">learning rate</text>')
    for index, (name, mark) in enumerate(marks.items()):
        x = left + column(mark)
        parts.append(f'<path d="M{x},{top} V{bottom}" stroke="#c33" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x + 4}" y="{top + 12 + 14 * index}" fill="#c33">{html.escape(name)} {mark:.1e}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _range(ys: Sequence[float]) -> tuple[float, float]:
    """The values shown; what explodes beyond twice the fall is cut off, or nothing else could be seen."""
    low = min(ys)
    high = min(max(ys), ys[0] + max(ys[0] - low, 0.1 * abs(ys[0])))
    return low, high if high > low else low + 1.0


def _place(xs: Sequence[float], width: int) -> Callable[[float], int]:
    """Where a value lies on a logarithmic axis of ``width`` columns."""
    first, last = math.log(xs[0]), math.log(xs[-1])
    span = last - first or 1.0
    return lambda x: min(max(round((math.log(x) - first) / span * width), 0), width)
