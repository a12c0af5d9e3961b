"""Charts: every value at its place, every name in the SVG, equal bytes for equal data."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from imagen_jax.evaluation import charts
from imagen_jax.evaluation.charts import Point
from imagen_jax.evaluation.samples import EvaluationError

SVG = "{http://www.w3.org/2000/svg}"
LINES = {
    "a <b> & c": [Point(0.0, 0.0, 0.0, 0.5, label="w=1"), Point(10.0, 1.0, left=8.0, right=11.0)],
    "d": [Point(5.0, 0.5)],
}


def rate(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


BARS = {
    "all": {"mine": rate(0.75, 0.5, 0.9), "theirs": rate(0.25, 0.1, 0.5)},
    "Colors & more": {"theirs": rate(1.0, 0.6, 1.0)},
}


def line_chart(lines=LINES):
    return charts.line_chart(lines, title="T < U", x_label="weight", y_label="share")


def texts(svg):
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def bars_of(figure):
    return [bar for container in figure.axes[0].containers for bar in _patches(container)]


def _patches(container):
    return [part for part in container if hasattr(part, "get_height")]


def error_bars(axes):
    """The segments [n, 2, 2] of all error bars."""
    return np.array([segment for lines in axes.collections for segment in lines.get_segments()])


def test_bars_have_their_heights_groups_and_error_bars():
    figure = charts.bar_chart(BARS, title="fidelity")
    bars = bars_of(figure)
    assert [bar.get_height() for bar in bars] == pytest.approx([75, 25, 100])
    groups = [round(bar.get_x() + bar.get_width() / 2) for bar in bars]
    assert groups == [0, 0, 1]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(a[1] < b[0] for a, b in zip(edges[:-1], edges[1:], strict=True))
    ends = [sorted(segment[:, 1]) for segment in error_bars(figure.axes[0])]
    np.testing.assert_allclose(ends, [[50, 90], [10, 50], [60, 100]])
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    np.testing.assert_allclose(error_bars(figure.axes[0])[:, 0, 0], middles)
    assert bars[1].get_facecolor() == bars[2].get_facecolor() != bars[0].get_facecolor()
    assert {"fidelity", "all", "Colors & more", "mine", "theirs", "%"} <= texts(
        charts.to_svg(figure)
    )


def test_a_mean_outside_its_interval_by_rounding_is_shown():
    figure = charts.bar_chart({"g": {"a": rate(0.5, 0.5 + 1e-12, 0.6)}}, title="t")
    assert bars_of(figure)[0].get_height() == 50


def test_points_are_at_their_values():
    axes = line_chart().axes[0]
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in LINES}
    for name, points in LINES.items():
        np.testing.assert_array_equal(lines[name].get_xdata(), [p.x for p in points])
        np.testing.assert_array_equal(lines[name].get_ydata(), [p.y for p in points])
    assert len({line.get_color() for line in lines.values()}) == 2
    segments = error_bars(axes)
    np.testing.assert_allclose(segments, [[[0, 0], [0, 0.5]], [[8, 1], [11, 1]]])
    (label,) = axes.texts
    assert label.get_text() == "w=1" and label.xy == (0.0, 0.0)


def test_the_svg_has_every_name():
    assert {"T < U", "a <b> & c", "d", "w=1", "weight", "share"} <= texts(
        charts.to_svg(line_chart())
    )


def test_equal_data_give_equal_bytes():
    assert charts.to_svg(line_chart()) == charts.to_svg(line_chart())
    assert charts.to_svg(charts.bar_chart(BARS, title="t")) == charts.to_svg(
        charts.bar_chart(BARS, title="t")
    )
    assert "<dc:date>" not in charts.to_svg(line_chart())


def test_pixels_show_the_line_colours():
    pixels = charts.to_pixels(line_chart())
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    for color in charts.COLORS[:2]:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(-1).sum() > 20, color


def test_long_names_are_inside_the_figure():
    lines = {f"a rather long name of a line {i}": [Point(0.0, float(i))] for i in range(7)}
    figure = line_chart(lines)
    charts.to_svg(figure)  # Computes the layout.
    box, (legend,) = figure.bbox, figure.legends
    for text in legend.get_texts():
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text.get_text()
        assert box.y0 <= extent.y0 and extent.y1 <= figure.axes[0].get_window_extent().y0


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for make in (line_chart, charts.check_installed):
        with pytest.raises(EvaluationError, match=r"matplotlib.*\[eval\]"):
            make()
