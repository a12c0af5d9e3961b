"""Charts as SVG and PNG by matplotlib: bars with intervals (Figure 3), lines (Figures 4 and A.9).

Charts are matplotlib figures without global state. Equal data give equal bytes of SVG: element ids
are hashed with a fixed salt, and no date is written.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation.samples import EvaluationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2a6fdb", "#e0913a", "#6a9f58", "#9a5fb5", "#c0392b", "#16857a", "#7f6a4d", "#555e6e")
DPI = 160  # of the PNG
# Text stays text in the SVG, so that it can be searched; ids depend on the content alone.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "imagen_jax", "font.size": 9}
_METADATA = {"svg": {"Date": None}, "png": {"Software": None}}
_BAR_INCHES, _MIN_INCHES = 0.3, 5.2
_LETTER_INCHES, _KEY_INCHES, _ROW_INCHES = 0.07, 0.6, 0.18  # of the legend


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point; an interval that is None has no error bar.

    Attributes:
      x: horizontal position.
      y: measured value.
      low, high: ends of the interval of y.
      label: annotation of the point, for example its setting.
      left, right: ends of the interval of x.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    left: float | None = None
    right: float | None = None


def bar_chart(bars: Mapping[str, Mapping[str, Mapping[str, float]]], *, title: str) -> Figure:
    """Groups of bars with error bars, in percent.

    Args:
      bars: group -> series -> `mean`, `low`, `high` in 0..1; without `low` and `high` no error bar.
      title: title of the chart.
    """
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    count = max(len(bars) * (len(series) + 1), 1)
    axes = _axes(max(_BAR_INCHES * count, _MIN_INCHES), 3.6, title)
    width = 0.8 / max(len(series), 1)
    for index, name in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * width
        groups = [i for i, rates in enumerate(bars.values()) if name in rates]
        rates = [rates[name] for rates in bars.values() if name in rates]
        means, lows, highs = (
            100 * np.array([rate.get(part, np.nan) for rate in rates])
            for part in ("mean", "low", "high")
        )
        axes.bar(
            [i + offset for i in groups],
            means,
            width=0.92 * width,
            color=COLORS[index % len(COLORS)],
            label=name,
            # Rounding can put a mean a little beyond an end of its interval.
            yerr=np.maximum([means - lows, highs - means], 0),
            error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#222222"},
        )
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("%")
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(bars) > 4 else {}
    axes.set_xticks(range(len(bars)), list(bars), **turned)
    axes.grid(visible=False, axis="x")
    _add_legend(axes, series)
    return _figure_of(axes)


def line_chart(
    lines: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str
) -> Figure:
    """Lines through points, in the given order, with error bars.

    Args:
      lines: name -> points, at least one point in all.
      title: title of the chart.
      x_label: quantity and unit of the horizontal axis.
      y_label: quantity and unit of the vertical axis.
    """
    axes = _axes(6.2, 4.4, title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for index, (name, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        axes.plot(
            [point.x for point in points],
            [point.y for point in points],
            color=color,
            marker="o",
            markersize=4,
            label=name,
        )
        for point in points:
            _add_interval(axes, point, color)
            if point.label:
                axes.annotate(
                    point.label,
                    (point.x, point.y),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=color,
                )
    _add_legend(axes, list(lines))
    return _figure_of(axes)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document."""
    return _save(figure, "svg").decode("utf-8")


def to_pixels(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    """The figure as RGB pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(_save(figure, "png"))) as image:
        return np.asarray(image.convert("RGB"))


def _save(figure: Figure, format: str) -> bytes:
    stream = io.BytesIO()
    with _matplotlib().rc_context(_STYLE):
        figure.savefig(stream, format=format, dpi=DPI, metadata=_METADATA[format])
    return stream.getvalue()


def _matplotlib() -> Any:
    """The library; an error that names the extra if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise EvaluationError(
            "charts need matplotlib; install imagen_jax with the extra [eval]"
        ) from error
    return matplotlib


def check_installed() -> None:
    """Raises EvaluationError if matplotlib is missing: before a measurement, not after it."""
    _matplotlib()


def _axes(width: float, height: float, title: str) -> Axes:
    """Axes of a new figure; sizes in inches."""
    with _matplotlib().rc_context(_STYLE):
        from matplotlib.figure import Figure

        axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(visible=True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return axes


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _add_legend(axes: Axes, names: Sequence[str]) -> None:
    """Names of the lines or series below the plot, in as many columns as fit."""
    figure = _figure_of(axes)
    width, height = figure.get_size_inches()
    widest = _KEY_INCHES + _LETTER_INCHES * max(map(len, names), default=0)
    columns = min(max(int(width / widest), 1), max(len(names), 1))
    rows = -(-len(names) // columns)
    figure.set_size_inches(width, height + _ROW_INCHES * rows)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _add_interval(axes: Axes, point: Point, color: str) -> None:
    y = _distances(point.y, point.low, point.high)
    x = _distances(point.x, point.left, point.right)
    if y is not None or x is not None:
        axes.errorbar(
            [point.x], [point.y], yerr=y, xerr=x, fmt="none", ecolor=color, alpha=0.45, capsize=2
        )


def _distances(value: float, low: float | None, high: float | None) -> np.ndarray | None:
    """Lengths of the two halves of an error bar, [2, 1]; None without an interval."""
    if low is None or high is None:
        return None
    return np.maximum([[value - low], [high - value]], 0)
