"""Bars with their intervals, the form of the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Mapping

from imagen_jax.evaluation.canvas import Canvas

COLORS = ("#2a6fdb", "#e0913a", "#6a9f58", "#9a5fb5")
BAR, GAP, HEIGHT = 22, 26, 220  # pixels
LEFT, TOP = 52, 56
LETTER = 8  # Pixels that a letter takes at most.


def draw(bars: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> str:
    """An SVG of groups of bars.

    Args:
      bars: group -> series -> `mean`, `low`, `high` in 0..1.
      title: the line above.
    """
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(series)}
    group_width = BAR * len(series) + GAP
    right, bottom = LEFT + group_width * len(bars), TOP + HEIGHT
    below = LETTER * max(map(len, bars), default=0) + 20
    sheet = Canvas(max(right + 20, LEFT + LETTER * len(title)), bottom + below)
    sheet.words(LEFT, 18, title, size=14)
    for percent in range(0, 101, 25):
        y = bottom - HEIGHT * percent / 100
        sheet.path([(LEFT, y), (right, y)], "#888888" if percent in (0, 50) else "#dddddd")
        sheet.words(LEFT - 6, y + 4, f"{percent}%", anchor="end")
    x = LEFT
    for name, color in colors.items():
        sheet.box(x, 28, 12, 12, color)
        sheet.words(x + 17, 38, name)
        x += 40 + LETTER * len(name)
    for number, (group, rates) in enumerate(bars.items()):
        start = LEFT + GAP / 2 + number * group_width
        for index, name in enumerate(series):
            if name in rates:
                _bar(sheet, start + BAR * index, bottom, rates[name], colors[name])
        middle = start + BAR * len(series) / 2
        sheet.words(middle + 4, bottom + 8, group, anchor="end", turned=True)
    return sheet.svg()


def _bar(sheet: Canvas, x: float, bottom: int, rate: Mapping[str, float], color: str) -> None:
    """A bar with the whisker of its interval."""
    top, low, high = (bottom - HEIGHT * rate[part] for part in ("mean", "low", "high"))
    middle, dark = x + BAR / 2, "#222222"
    sheet.box(x + 1, top, BAR - 2, bottom - top, color)
    sheet.path([(middle, low), (middle, high)], dark)
    for end in (low, high):
        sheet.path([(middle - 4, end), (middle + 4, end)], dark)
