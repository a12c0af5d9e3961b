"""KID, precision and recall, CMMD: against their definitions and known values."""

import itertools
import math

import numpy as np
import pytest

from imagen_jax.evaluation.features import distances
from imagen_jax.evaluation.features.distances import cmmd, kid, precision_recall
from imagen_jax.evaluation.samples import EvaluationError

RNG = np.random.default_rng(0)


def test_kid_equals_its_definition():
    a, b = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3)) + 1

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = (
        np.mean([k(x, y) for x, y in itertools.permutations(a, 2)])
        + np.mean([k(x, y) for x, y in itertools.permutations(b, 2)])
        - 2 * np.mean([k(x, y) for x, y in itertools.product(a, b)])
    )
    found = kid(a, b)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


# Images of each set, shift and scale of the second one. The features are rectified projections.
PANELS = [(100, 100, 0.0, 1.0), (100, 100, 0.3, 1.0), (60, 300, 0.0, 1.0), (60, 300, 0.3, 1.0)]


@pytest.mark.parametrize(("n", "m", "shift", "scale"), PANELS)
def test_the_interval_of_kid_covers_the_truth(n, m, shift, scale, repeats=250):
    """Simulated coverage; the standard error is the spread of the estimates over new images."""
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(64, 96)) / 8

    def features(count: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
        return np.maximum((rng.normal(size=(count, 64)) * scale + shift) @ weights, 0)

    truth = 0.0
    if shift or scale != 1:
        pairs = [kid(features(1500), features(1500, shift, scale)).value for _ in range(4)]
        truth = float(np.mean(pairs))
    found = [kid(features(n), features(m, shift, scale)) for _ in range(repeats)]
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.15)
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    # 0.92 to 0.98, and twice the standard deviation of 250 trials.
    assert 0.892 <= covered <= 0.996, covered


def test_precision_and_recall_separate_missing_from_wrong():
    left, right = RNG.normal(size=(2, 400, 2)) + np.array([[[-30]], [[30]]])
    both = np.concatenate([left, right])
    half = precision_recall(RNG.normal(size=(400, 2)) - 30, both)
    assert half.precision > 0.9 and 0.4 < half.recall < 0.5
    more = precision_recall(both, left)
    assert more.precision == 0.5 and more.recall == 1.0


def test_precision_with_a_known_border():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    # Third neighbours are 10, 9, 8 and 10 away: 18.5 is within 8.5 of the last, 20.5 of none.
    generated = np.array([[18.5], [20.5], [-9.5], [-10.5]])
    assert precision_recall(generated, real).precision == 0.5


def test_cmmd_equals_its_definition():
    a, b = RNG.normal(size=(6, 4)), RNG.normal(size=(9, 4)) + 0.5
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))

    def mean(p, q):
        return np.mean([math.exp(-((s - t) ** 2).sum() / 200) for s in p for t in q])

    assert cmmd(a, b) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert cmmd(a, 3 * a) == pytest.approx(0, abs=1e-12)


def test_blocks_change_nothing(monkeypatch):
    a, b = RNG.normal(size=(40, 3)), RNG.normal(size=(30, 3)) + 0.3
    whole = precision_recall(a, b), cmmd(a, b)
    monkeypatch.setattr(distances, "_ROWS", 7)
    assert precision_recall(a, b) == whole[0]
    assert cmmd(a, b) == pytest.approx(whole[1], rel=1e-9)


def test_incompatible_features_are_rejected():
    with pytest.raises(EvaluationError, match="size 2 and 3 cannot"):
        kid(np.zeros((4, 2)), np.zeros((4, 3)))
    with pytest.raises(EvaluationError, match="at least 4"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
