"""Frechet distance against scipy and closed forms; merged statistics; foreign files."""

import zipfile

import numpy as np
import pytest
from scipy import linalg, stats

from imagen_jax.evaluation.features import frechet
from imagen_jax.evaluation.features.frechet import Gaussian, Statistics
from imagen_jax.evaluation.samples import EvaluationError

RNG = np.random.default_rng(0)


def basis(d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(np.asarray(mean, float), np.asarray(covariance, float))


@pytest.mark.parametrize("d", [2, 16, 64])
def test_equals_scipys_square_root(d):
    clouds = [RNG.normal(size=(8 * d, d)) @ RNG.normal(size=(d, d)) + shift for shift in (0, 0.3)]
    a, b = (Statistics.of(cloud).gaussian() for cloud in clouds)
    np.testing.assert_allclose(a.covariance, np.cov(clouds[0], rowvar=False))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    gap = a.mean - b.mean
    expected = gap @ gap + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [64, 20, 1])
def test_commuting_covariances_of_any_rank(rank):
    u, d = basis(64), 64
    x, y = RNG.uniform(0.1, 3, d), RNG.uniform(0.1, 3, d)
    x[rank:] = y[: d - rank] = 0  # They share what lies in the middle, if anything.
    means = RNG.normal(size=(2, d))
    a, b = gaussian(means[0], u * x @ u.T), gaussian(means[1], u * y @ u.T)
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(x) - np.sqrt(y)) ** 2).sum()
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_covariances_that_do_not_commute():
    u, v = RNG.normal(size=(2, 100))
    zero = np.zeros(100)
    a, b = gaussian(zero, np.outer(u, u)), gaussian(zero, np.outer(v, v))
    # Of rank one: |u|^2 + |v|^2 - 2 |u.v|.
    assert frechet.distance(a, b) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-9)
    # A plane in 100 dimensions is at the distance it has in its own two.
    plane = basis(100)[:2]
    small = [gaussian(np.zeros(2), np.cov(RNG.normal(size=(2, 9)))) for _ in range(2)]
    large = [gaussian(zero, plane.T @ g.covariance @ plane) for g in small]
    assert frechet.distance(*large) == pytest.approx(frechet.distance(*small), rel=1e-9)


def test_a_set_has_distance_zero_to_itself():
    few = Statistics.of(RNG.normal(size=(50, 150)) * 10).gaussian()
    assert frechet.distance(few, few) < 1e-9


def test_parts_merge_exactly():
    features = (RNG.normal(size=(1000, 32)) + 100).astype(np.float32)
    parts = np.split(features, [1, 4, 90, 100, 301, 800])
    whole = Statistics.of(features)
    for order in (range(7), reversed(range(7))):
        total = frechet.merged(Statistics.of(parts[i]) for i in order)
        assert total.count == 1000
        np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(total.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_the_interval_matches_the_deviation_over_new_images():
    reference = gaussian(np.zeros(6), np.diag(np.arange(1.0, 7)))
    scale = np.linspace(1, 2, 6)
    sets = [RNG.normal(size=(300, 6)) * scale + 0.3 for _ in range(300)]
    deviation = np.std([frechet.distance(Statistics.of(x).gaussian(), reference) for x in sets])
    intervals = [frechet.distance_interval(x, reference, resamples=40) for x in sets[:40]]
    halves = [i.high - i.value for i in intervals]
    halves += [i.value - i.low for i in intervals]
    assert np.mean(halves) == pytest.approx(stats.t.ppf(0.975, 39) * deviation, rel=0.15)
    again = frechet.distance_interval(sets[0], reference, resamples=40)
    assert again == intervals[0]
    assert again.value == frechet.distance(Statistics.of(sets[0]).gaussian(), reference)


def test_files_round_trip(tmp_path):
    own = Statistics.of(RNG.normal(size=(20, 3))).gaussian()
    frechet.save(tmp_path / "own.npz", own, {"filter": "clean"})
    back, about = frechet.load(tmp_path / "own.npz")
    assert about == {"filter": "clean"} and back.count == 20
    np.testing.assert_array_equal(own.covariance, back.covariance)
    np.testing.assert_array_equal(own.mean, back.mean)
    # What pytorch-fid, clean-fid and TTUR write.
    np.savez(tmp_path / "theirs.npz", mu=own.mean, sigma=own.covariance)
    theirs, about = frechet.load(tmp_path / "theirs.npz")
    assert (theirs.count, about) == (0, {})
    np.testing.assert_array_equal(own.covariance, theirs.covariance)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\[d, d\]"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "finite"),
    ],
)
def test_files_without_statistics_are_rejected(tmp_path, content, says):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(EvaluationError, match=says):
        frechet.load(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(EvaluationError, match="cannot read"):
        frechet.load(tmp_path / "text.npz")


def test_the_reason_is_one_line(tmp_path, monkeypatch):
    """The name of an array comes from the file."""
    monkeypatch.setattr(frechet, "MAX_ARRAY_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("of two\nlines.npy", bytes(200))
    with pytest.raises(EvaluationError, match="of two lines.npy has 200 bytes") as raised:
        frechet.load(tmp_path / "bad.npz")
    assert "\n" not in str(raised.value)


def test_incompatible_statistics_are_rejected():
    with pytest.raises(EvaluationError, match="size 2 and 3 cannot"):
        frechet.distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))
    with pytest.raises(EvaluationError, match="at least 2"):
        Statistics.of(np.zeros((1, 4))).gaussian()
