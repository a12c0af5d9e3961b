"""Lines through measured points, with their intervals, as SVG: sweeps and trade-offs."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence

from imagen_jax.evaluation.bar_chart import COLORS

WIDTH, HEIGHT = 420, 280  # of the plot, pixels
LEFT, TOP, BELOW = 64, 56, 48


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point.

    Attributes:
      x: where along the horizontal axis.
      y: the measured value.
      low: lower end of its interval; None: no whisker.
      high: upper end of its interval; None: no whisker.
      label: written beside the point, for example the setting it stands for.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


def draw(lines: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG of lines, each through its points in the order given.

    Args:
      lines: name -> points, at least one point in all.
      title: the line above.
      x_label: what is along the horizontal axis, with its unit.
      y_label: what is along the vertical axis, with its unit.
    """
    points = [point for line in lines.values() for point in line]
    x_ticks = ticks([point.x for point in points])
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_ticks = ticks(ends)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + WIDTH * across, 1), round(TOP + HEIGHT * (1.0 - up), 1)

    width = max(LEFT + WIDTH + 30, LEFT + 8 * len(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + BELOW}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>",
        f'<text transform="translate(16 {TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>",
    ]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<path d="M{x} {TOP}V{TOP + HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 17}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<path d="M{LEFT} {y}H{LEFT + WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    key = float(LEFT)
    for index, (name, line) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        parts.append(f'<rect x="{key}" y="28" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{key + 17}" y="38">{html.escape(name)}</text>')
        key += 40 + 7 * len(name)
        parts += _line(line, place, color)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(line: Sequence[Point], place: Callable, color: str) -> list[str]:
    """One line: its whiskers, its path, its points and their labels."""
    parts = []
    for point in line:
        if point.low is not None and point.high is not None:
            (x, low), (_, high) = place(point.x, point.low), place(point.x, point.high)
            parts.append(f'<path d="M{x} {low}V{high}" stroke="{color}" stroke-opacity="0.5"/>')
    path = "L".join("{} {}".format(*place(point.x, point.y)) for point in line)
    parts.append(f'<path d="M{path}" stroke="{color}" stroke-width="2" fill="none"/>')
    for point in line:
        x, y = place(point.x, point.y)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        if point.label:
            parts.append(
                f'<text x="{x + 5}" y="{y - 5}" font-size="10" fill="{color}">'
                f"{html.escape(point.label)}</text>"
            )
    return parts


def ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers, evenly spaced, that enclose `values`."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    size = 10.0 ** math.floor(math.log10((high - low) / 4.0))
    step = next(s * size for s in (1.0, 2.0, 5.0, 10.0) if (high - low) / (s * size) <= 6.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * count, 10) for count in range(first, last + 1)]
