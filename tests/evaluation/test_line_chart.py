"""Line charts: round ticks, every point where it belongs, foreign names escaped."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from imagen_jax.evaluation import canvas, line_chart
from imagen_jax.evaluation.line_chart import Point


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 10.0], [0, 2, 4, 6, 8, 10]),
        ([0.31, 0.74], [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([5.0, 5.0], [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks(values, expected):
    np.testing.assert_allclose(line_chart.ticks(values), expected)


def test_ticks_enclose_whatever_is_given():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = list(rng.normal(size=2) * 10.0 ** rng.integers(-6, 7))
        found = line_chart.ticks(values)
        steps = np.diff(found)
        assert found[0] <= min(values) + 1e-8 and max(values) - 1e-8 <= found[-1]
        assert 3 <= len(found) <= 9 and np.allclose(steps, steps[0])


def test_a_chart_has_every_point_and_is_well_formed():
    lines = {
        "a <b> & c": [Point(0.0, 0.0, 0.0, 0.5, label="w=1"), Point(10.0, 1.0)],
        "d": [Point(5.0, 0.5)],
    }
    svg = line_chart.draw(lines, title="T < U", x_label="weight", y_label="share")
    root = ElementTree.fromstring(svg)
    circles = root.findall("{*}circle")
    middle = [(float(c.get("cx")), float(c.get("cy"))) for c in circles]
    left, top = line_chart.LEFT, line_chart.TOP
    right, bottom = left + line_chart.WIDTH, top + line_chart.HEIGHT
    assert middle == [(left, bottom), (right, top), ((left + right) / 2, (top + bottom) / 2)]
    texts = [text.text for text in root.findall("{*}text")]
    assert {"T < U", "a <b> & c", "d", "w=1", "weight", "share"} <= set(texts)
    assert f'd="M{left} {bottom}L{left} {(top + bottom) / 2:g}"' in svg


def test_pixels_show_what_the_svg_says():
    lines = {
        "first": [Point(0.0, 0.0), Point(10.0, 1.0, left=8.0, right=10.0)],
        "second": [Point(5.0, 0.2)],
    }
    sheet = line_chart.plot(lines, title="title", x_label="x", y_label="up")
    pixels = sheet.pixels()
    assert pixels.shape == (canvas.SCALE * sheet.height, canvas.SCALE * sheet.width, 3)

    def color(x, y):
        return "#" + "".join(
            f"{c:02x}" for c in pixels[int(canvas.SCALE * y), int(canvas.SCALE * x)]
        )

    left, bottom = line_chart.LEFT, line_chart.TOP + line_chart.HEIGHT
    assert color(left, bottom) == line_chart.COLORS[0]
    assert (
        color(left + line_chart.WIDTH / 2, bottom - 0.2 * line_chart.HEIGHT)
        == (line_chart.COLORS[1])
    )
    # On the middle of the first line, and on its whisker, which is paler.
    assert (
        color(left + line_chart.WIDTH / 4, bottom - line_chart.HEIGHT / 4) == (line_chart.COLORS[0])
    )
    whisker = color(left + 0.9 * line_chart.WIDTH, line_chart.TOP + 0.25)
    assert whisker not in ("#ffffff", line_chart.GRID, line_chart.COLORS[0])
    # The words beside the vertical axis are turned: a narrow column of ink left of the ticks.
    ink = np.argwhere((pixels < 128).all(-1)[:, : canvas.SCALE * 20])
    assert (
        len(ink)
        and np.ptp(ink[:, 0]) > 0
        and abs(ink[:, 0].mean() / canvas.SCALE - line_chart.TOP - line_chart.HEIGHT / 2) < 3
    )


def test_many_names_fill_several_rows_within_the_sheet():
    lines = {f"a rather long name {i}": [Point(0.0, float(i))] for i in range(7)}
    sheet = line_chart.plot(lines, title="t", x_label="x", y_label="y")
    texts = ElementTree.fromstring(sheet.svg()).findall("{*}text")
    places = {t.text: (float(t.get("x")), float(t.get("y"))) for t in texts if t.text in lines}
    assert len(places) == len(set(places.values())) == 7
    assert len({y for _, y in places.values()}) > 2
    assert all(x + 7 * len(name) <= sheet.width for name, (x, _) in places.items())
    dots = ElementTree.fromstring(sheet.svg()).findall("{*}circle")
    assert min(float(dot.get("cy")) for dot in dots) > max(y for _, y in places.values())
