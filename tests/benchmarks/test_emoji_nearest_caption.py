"""The nearest caption of a name, on vectors whose answer is known."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from emoji_nearest_caption import rank


def test_ranks_count_emoji_and_not_their_tones():
    captions = np.eye(4)[[0, 0, 1, 2]]
    names = np.array([[0.9, 0.4, 0.0, 0.0], [0.9, 0.4, 0.0, 0.0], [0.9, 0.4, 0.3, 0.0]])
    ranks = rank(names, captions, ["a", "b", "c"], ["a", "a", "b", "c"])
    np.testing.assert_array_equal(ranks, [1, 2, 3])
