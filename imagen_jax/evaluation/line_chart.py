"""Lines through measured points, with their intervals: sweeps and trade-offs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from imagen_jax.evaluation import bar_chart
from imagen_jax.evaluation.canvas import Canvas, Number

WIDTH, HEIGHT = 420, 280  # of the plot, pixels
LEFT, TOP, BELOW = 64, 56, 48  # TOP: where the names of the lines fill one row.
GRID = "#dddddd"
COLORS = (*bar_chart.COLORS, "#c0392b", "#16857a", "#7f6a4d", "#555e6e")


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point.

    Attributes:
      x: where along the horizontal axis.
      y: the measured value.
      low: lower end of its interval; None: no whisker.
      high: upper end of its interval; None: no whisker.
      label: written beside the point, for example the setting it stands for.
      left: lower end of the interval of x; None: no whisker.
      right: upper end of the interval of x; None: no whisker.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    left: float | None = None
    right: float | None = None


def draw(lines: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str) -> str:
    """The chart of `plot` as an SVG."""
    return plot(lines, title=title, x_label=x_label, y_label=y_label).svg()


def plot(lines: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str) -> Canvas:
    """Lines, each through its points in the order given.

    Args:
      lines: name -> points, at least one point in all.
      title: the line above.
      x_label: what is along the horizontal axis, with its unit.
      y_label: what is along the vertical axis, with its unit.
    """
    points = [point for line in lines.values() for point in line]
    x_ticks = ticks([v for p in points for v in (p.x, p.left, p.right) if v is not None])
    y_ticks = ticks([v for p in points for v in (p.y, p.low, p.high) if v is not None])
    width = max(LEFT + WIDTH + 30, LEFT + 8 * len(title))
    keys, top = _keys(list(lines), width)
    bottom = top + HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + WIDTH * across, 1), round(bottom - HEIGHT * up, 1)

    sheet = Canvas(width, bottom + BELOW)
    sheet.words(LEFT, 18, title, size=14)
    sheet.words(LEFT + WIDTH / 2, bottom + 38, x_label, anchor="middle")
    sheet.words(16, top + HEIGHT / 2, y_label, anchor="middle", turned=True)
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        sheet.path([(x, top), (x, bottom)], GRID)
        sheet.words(x, bottom + 17, f"{tick:g}", anchor="middle")
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        sheet.path([(LEFT, y), (LEFT + WIDTH, y)], GRID)
        sheet.words(LEFT - 6, y + 4, f"{tick:g}", anchor="end")
    for index, (name, line) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        x, y = keys[index]
        sheet.box(x, y, 12, 12, color)
        sheet.words(x + 17, y + 10, name)
        _draw_line(sheet, line, place, color)
    return sheet


def _keys(names: Sequence[str], width: Number) -> tuple[list[tuple[float, float]], float]:
    """Where the names of the lines stand, row by row, and where the plot begins below them."""
    places, x, y = [], float(LEFT), 28.0
    for name in names:
        wide = 40 + 7 * len(name)
        if x > LEFT and x + wide > width:
            x, y = float(LEFT), y + 18
        places.append((x, y))
        x += wide
    return places, y + TOP - 28


def _draw_line(sheet: Canvas, line: Sequence[Point], place: Callable, color: str) -> None:
    """One line: the whiskers of its points, its path, the points and their labels."""
    for point in line:
        if point.low is not None and point.high is not None:
            sheet.path([place(point.x, point.low), place(point.x, point.high)], _pale(color))
        if point.left is not None and point.right is not None:
            sheet.path([place(point.left, point.y), place(point.right, point.y)], _pale(color))
    sheet.path([place(point.x, point.y) for point in line], color, 2)
    for point in line:
        x, y = place(point.x, point.y)
        sheet.dot(x, y, 3, color)
        if point.label:
            sheet.words(x + 5, y - 5, point.label, size=10, color=color)


def _pale(color: str) -> str:
    """Half-way between a colour `#rrggbb` and white."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(channel + 255) // 2:02x}" for channel in channels)


def ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers, evenly spaced, that enclose `values`."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    size = 10.0 ** math.floor(math.log10((high - low) / 4.0))
    step = next(s * size for s in (1.0, 2.0, 5.0, 10.0) if (high - low) / (s * size) <= 6.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * count, 10) for count in range(first, last + 1)]
