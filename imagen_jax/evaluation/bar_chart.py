"""Bars with their intervals as SVG, the form of the paper's Figure 3."""

from __future__ import annotations

import html
from collections.abc import Mapping

COLORS = ("#2a6fdb", "#e0913a", "#6a9f58", "#9a5fb5")
BAR, GAP, HEIGHT = 22, 26, 220  # pixels
LEFT, TOP, BELOW = 52, 56, 110


def draw(bars: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> str:
    """An SVG of groups of bars.

    Args:
      bars: group -> series -> `mean`, `low`, `high` in 0..1.
      title: the line above.
    """
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    group_width = BAR * len(series) + GAP
    right = LEFT + group_width * len(bars)
    width, bottom = max(right + 20, LEFT + 8 * len(title)), TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + BELOW}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
    ]
    for percent in range(0, 101, 25):
        y = bottom - HEIGHT * percent / 100
        stroke = "#888" if percent in (0, 50) else "#ddd"
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{stroke}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>')
    x = float(LEFT)
    for index, name in enumerate(series):
        parts.append(f'<rect x="{x}" y="28" width="12" height="12" fill="{_color(index)}"/>')
        parts.append(f'<text x="{x + 17}" y="38">{html.escape(name)}</text>')
        x += 40 + 7 * len(name)
    for number, (group, rates) in enumerate(bars.items()):
        start = LEFT + GAP / 2 + number * group_width
        for index, name in enumerate(series):
            if name in rates:
                parts.append(_bar(start + BAR * index, bottom, rates[name], _color(index)))
        middle, y = start + BAR * len(series) / 2, bottom + 14
        parts.append(
            f'<text x="{middle}" y="{y}" text-anchor="end" '
            f'transform="rotate(-35 {middle} {y})">{html.escape(group)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _bar(x: float, bottom: int, rate: Mapping[str, float], color: str) -> str:
    """A bar with the whisker of its interval."""
    top, low, high = (bottom - HEIGHT * rate[part] for part in ("mean", "low", "high"))
    middle = x + BAR / 2
    return (
        f'<rect x="{x + 1}" y="{top:.1f}" width="{BAR - 2}" height="{bottom - top:.1f}" '
        f'fill="{color}"/>'
        f'<path d="M{middle} {low:.1f}V{high:.1f}M{middle - 4} {low:.1f}h8M{middle - 4} '
        f'{high:.1f}h8" stroke="#222" fill="none"/>'
    )
