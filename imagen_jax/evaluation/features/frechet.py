"""Frechet distance of two clouds of features (Heusel et al. 2017, arXiv:1706.08500).

Every cloud is summed up by its mean and covariance, in float64 on the host; clouds that are seen in
parts are merged exactly. `distance` is what FID is made of (evaluation/fid.py); it does not care
which network the features come from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg, stats

from imagen_jax.evaluation.intervals import CONFIDENCE
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic


class Gaussian(NamedTuple):
    """What a cloud of features is taken for.

    Attributes:
      mean: of each feature.
      covariance: unbiased, divided by count - 1 as by the other implementations.
      count: pictures behind it; 0: the file does not say.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over a cloud, or a part of one.

    Attributes:
      count: pictures.
      mean: float64, of each feature.
      scatter: float64, sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> Statistics:
        """Of one or more pictures' features."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> Statistics:
        """Those of both together, exact (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return Statistics(count, mean, self.scatter + other.scatter + between)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises EvaluationError for fewer than two pictures."""
        if self.count < 2:
            raise EvaluationError(f"{self.count} picture has no covariance; give at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def merged(parts: Iterable[Statistics]) -> Statistics:
    """All parts as one, from the first to the last."""
    return functools.reduce(Statistics.merge, parts)


def distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |m_a - m_b|^2 + tr(C_a + C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2). The last trace is the sum of
    the singular values of F_a^T F_b for any factors C = F F^T. Unlike the matrix square root of
    C_a C_b, they are real, and as exact for covariances without full rank (fewer pictures than
    features).
    """
    _check_sizes(a, b)
    return _distance(a, b, _factor(b.covariance))


def _distance(a: Gaussian, b: Gaussian, factor: Float[np.ndarray, "d r"]) -> float:
    """`distance`, given the factor of b's covariance, which takes a while to find."""
    gap = a.mean - b.mean
    overlap = np.linalg.svd(_factor(a.covariance).T @ factor, compute_uv=False).sum()
    total = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(total), 0.0)


def _factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """F with F F^T = covariance and as many columns as its rank: Cholesky's, with pivots.

    Eigenvectors would give a factor as well, but take far longer. Pivots that are only rounding
    would count by their square roots, which are not small: there it ends.
    """
    symmetric = (covariance + covariance.T) / 2
    least = max(symmetric.diagonal().max(), 0) * len(symmetric) * np.finfo(np.float64).eps
    (pivoted,) = linalg.get_lapack_funcs(("pstrf",), (symmetric,))
    upper, order, rank, _ = pivoted(symmetric, tol=least)
    factor = np.zeros((len(symmetric), rank))
    factor[order - 1] = np.triu(upper)[:rank].T
    return factor


def _check_sizes(a: Gaussian, b: Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared; use the "
            "network that the reference was made with"
        )


class Interval(NamedTuple):
    """A distance with its 95% interval."""

    value: float
    low: float
    high: float


def distance_interval(
    features: Float[np.ndarray, "n d"], reference: Gaussian, *, resamples: int, seed: int = 0
) -> Interval:
    """Distance of pictures to a reference, and how far it would move for other such pictures.

    The interval is the distance plus and minus Student's quantile times the spread of the distances
    of resampled pictures (bootstrap); the reference stays as it is. Their percentiles are of no
    use: a resample repeats pictures, has a smaller covariance in effect and hence a larger
    distance than the pictures themselves.

    Args:
      features: of the pictures.
      reference: what they are compared with.
      resamples: how many times pictures are drawn with replacement, at least 2.
      seed: of the draws.
    """
    own = Statistics.of(features).gaussian()
    _check_sizes(own, reference)
    factor = _factor(reference.covariance)
    value = _distance(own, reference, factor)
    centred = np.asarray(features, np.float64) - own.mean
    # Eigenvalues of F^T C F are the squared singular values, and C is a sum over pictures.
    seen = centred @ factor
    norms, count = (centred**2).sum(1), len(centred)
    drawn = []
    for number in range(resamples):
        draw = np.random.default_rng([seed, number]).multinomial(count, np.full(count, 1 / count))
        rows = np.flatnonzero(draw)
        weights = draw[rows].astype(np.float64)
        shift, seen_shift = weights @ centred[rows] / count, weights @ seen[rows] / count
        weighted = (seen[rows] - seen_shift) * np.sqrt(weights)[:, None]
        few = len(weighted) < weighted.shape[1]
        # W W^T and W^T W have the same eigenvalues but for zeros.
        inner = weighted @ weighted.T if few else weighted.T @ weighted
        squares = np.linalg.eigvalsh(inner / (count - 1))
        overlap = np.sqrt(np.maximum(squares, 0)).sum()
        gap = own.mean + shift - reference.mean
        trace = (weights @ norms[rows] - count * shift @ shift) / (count - 1)
        drawn.append(gap @ gap + trace + np.trace(reference.covariance) - 2 * overlap)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, resamples - 1) * np.std(drawn, ddof=1)
    return Interval(value, max(value - float(half), 0.0), value + float(half))


def save(path: str | os.PathLike[str], gaussian: Gaussian, about: Mapping[str, Any]) -> None:
    """Writes an .npz that pytorch-fid, clean-fid and TTUR read too (`mu`, `sigma`).

    Args:
      path: file to write, whole or not at all.
      gaussian: what is saved.
      about: JSON values, such as the network and the filter behind it.
    """
    with atomic.file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            mu=gaussian.mean,
            sigma=gaussian.covariance,
            count=gaussian.count,
            about=json.dumps(dict(about), sort_keys=True),
        )


def load(path: str | os.PathLike[str]) -> tuple[Gaussian, dict[str, Any]]:
    """Reads statistics as `save`, pytorch-fid, clean-fid or TTUR wrote them.

    Returns:
      Mean and covariance, and what `save` was told about them; {} for a file of others.

    Raises:
      EvaluationError: no such file, or it holds no `mu` and `sigma` that belong together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean = np.asarray(file["mu"], np.float64)
            covariance = np.asarray(file["sigma"], np.float64)
            count = int(file["count"]) if "count" in file else 0
            about = json.loads(str(file["about"])) if "about" in file else {}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"cannot read statistics {path}: {error}; give an .npz with mu and sigma"
        ) from error
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape and mean.size > 0
    if not fits or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} are not a mean [d] and a "
            "covariance [d, d] of finite numbers"
        )
    return Gaussian(mean, covariance, count), about
