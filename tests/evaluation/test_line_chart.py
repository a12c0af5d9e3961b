"""Line charts: round ticks, every point where it belongs, foreign names escaped."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from imagen_jax.evaluation import line_chart
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
    assert re.search(rf"M{float(left)} {float(bottom)}V{float(top + bottom) / 2}", svg)
