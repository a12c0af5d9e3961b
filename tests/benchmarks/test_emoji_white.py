"""benchmarks/emoji_white.py: which pixels it reads."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import emoji_white


def test_only_pixels_that_are_white_in_the_real_image_count():
    real = np.full((1, 2, 10, 3), 255, np.uint8)
    real[0, 1] = (255, 255, 10)  # Yellow is not white.
    generated = np.zeros((1, 2, 10, 3), np.uint8)
    generated[0, 0] = np.linspace(200, 245, 10, dtype=np.uint8)[:, None]
    mean, tenth = emoji_white.levels(generated, real)
    assert mean == 222.5 and 200 <= tenth <= 206
