"""Frechet distance of two feature sets (Heusel et al. 2017, arXiv:1706.08500).

A set is represented by its mean and covariance, in float64 on the host; statistics of parts are
merged exactly. With Inception's features `distance` is the FID (features/fid.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg

from imagen_jax.evaluation import intervals
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic


class Gaussian(NamedTuple):
    """Mean and covariance of a feature set.

    Attributes:
      mean: of each feature.
      covariance: unbiased, divided by count - 1 as in the other implementations.
      count: number of images; 0: unknown (absent from the file).
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over a feature set or a part of one.

    Attributes:
      count: number of images.
      mean: float64, of each feature.
      scatter: float64, sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> Statistics:
        """Statistics of the features of one or more images."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of the union, exact (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return Statistics(count, mean, self.scatter + other.scatter + between)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises EvaluationError for fewer than two images."""
        if self.count < 2:
            raise EvaluationError(f"{self.count} image has no covariance; give at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all parts, merged in order."""
    return functools.reduce(Statistics.merge, parts)


def distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |m_a - m_b|^2 + tr(C_a + C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2). The last trace is the sum of
    the singular values of F_a^T F_b for any factors C = F F^T. Unlike the matrix square root of
    C_a C_b, it is real, and exact for rank-deficient covariances (fewer images than features).
    """
    _check_sizes(a, b)
    return _distance(a, b, _factor(b.covariance))


def _distance(a: Gaussian, b: Gaussian, factor: Float[np.ndarray, "d r"]) -> float:
    """`distance` with a precomputed factor of b's covariance (expensive)."""
    gap = a.mean - b.mean
    overlap = np.linalg.svd(_factor(a.covariance).T @ factor, compute_uv=False).sum()
    total = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(total), 0.0)


def _factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """F with F F^T = covariance and rank(covariance) columns: pivoted Cholesky decomposition.

    Eigenvectors would also give a factor, but take far longer. The decomposition stops at pivots
    of the size of rounding errors, because their square roots would not be negligible.
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
            f"features of size {len(a.mean)} and {len(b.mean)} cannot be compared; use the "
            "network of the reference"
        )


class Interval(NamedTuple):
    """A distance with its 95% interval."""

    value: float
    low: float
    high: float


def distance_interval(
    features: Float[np.ndarray, "n d"], reference: Gaussian, *, resamples: int, seed: int = 0
) -> Interval:
    """Distance of images to a reference, with an interval over new images of that number.

    The reference is fixed, and the interval does not cover the bias of the FID, which falls with
    the number of images. It is made of a jackknife over `resamples` groups of images: the distances
    without one group at a time, and without two (see `_interval`). A bootstrap is unsuitable: a
    resample repeats images, has a smaller effective covariance and varies up to four times as much.

    Args:
      features: features of the images.
      reference: statistics of the reference.
      resamples: number of groups, at least 2; at most one for each image.
      seed: seed of the groups.
    """
    own = Statistics.of(features).gaussian()
    _check_sizes(own, reference)
    factor = _factor(reference.covariance)
    value = _distance(own, reference, factor)
    without = _leave_out(np.asarray(features, np.float64) - own.mean, own, reference, factor)
    order = np.random.default_rng(seed).permutation(len(features))
    groups = np.array_split(order, min(resamples, len(order)))
    one = np.array([without(group) for group in groups])
    if len(groups) < 4:
        return _interval(value, one, None)
    pairs = [np.concatenate([groups[k], groups[k - 1]]) for k in range(len(groups))]
    return _interval(value, one, np.array([without(pair) for pair in pairs]))


def _leave_out(
    centred: Float[np.ndarray, "n d"],
    own: Gaussian,
    reference: Gaussian,
    factor: Float[np.ndarray, "d r"],
) -> Callable[[np.ndarray], float]:
    """Distance without the images of some indices.

    The squared singular values of `distance` are the eigenvalues of F^T C F, and C is a sum over
    images. With fewer images than features, those of the images' products are fewer.
    """
    projected, norms = centred @ factor, (centred**2).sum(1)
    few = len(projected) < projected.shape[1]
    products = projected @ projected.T if few else projected.T @ projected
    trace = np.trace(reference.covariance)

    def without(left_out: np.ndarray) -> float:
        rows = np.delete(np.arange(len(centred)), left_out)
        count, shift = len(rows), -centred[left_out].sum(0) / len(rows)
        if few:
            inner = products[np.ix_(rows, rows)]
            inner = inner - inner.mean(0) - inner.mean(1)[:, None] + inner.mean()
        else:
            mean = shift @ factor
            inner = products - projected[left_out].T @ projected[left_out]
            inner -= count * np.outer(mean, mean)
        divisor = max(count - 1, 1)  # A single image has no covariance.
        overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(inner / divisor), 0)).sum()
        gap = own.mean + shift - reference.mean
        own_trace = (norms[rows].sum() - count * shift @ shift) / divisor
        return float(gap @ gap + own_trace + trace - 2 * overlap)

    return without


def _interval(
    value: float, one: Float[np.ndarray, " g"], two: Float[np.ndarray, " g"] | None
) -> Interval:
    """95% interval of a distance from its jackknife, see `intervals.squared_distance`.

    Args:
      value: distance of all images.
      one: distances without group k.
      two: distances without groups k and k - 1; None: there are too few groups.
    """
    groups, second = len(one), 0.0
    if two is not None:  # Efron & Stein 1981, Sec. 4.
        left = groups * value - (groups - 1) * (one + np.roll(one, 1)) + (groups - 2) * two
        second = float(left.var(ddof=1)) / 2
    low, high = intervals.squared_distance(
        value,
        jackknife=float((groups - 1) / groups * ((one - one.mean()) ** 2).sum()),
        second=second,
        bias=float((groups - 1) * (one.mean() - value)),
        freedom=groups - 1,
    )
    return Interval(value, low, high)


def save(path: str | os.PathLike[str], gaussian: Gaussian, about: Mapping[str, Any]) -> None:
    """Writes an .npz that pytorch-fid, clean-fid and TTUR can read (`mu`, `sigma`).

    Args:
      path: file to write, atomically.
      gaussian: the statistics.
      about: JSON values such as the network and the filter.
    """
    with atomic.file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            mu=gaussian.mean,
            sigma=gaussian.covariance,
            count=gaussian.count,
            about=json.dumps(dict(about), sort_keys=True),
        )


# What NumPy and zipfile raise for damaged archives.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, ArithmeticError),
    *(AttributeError, MemoryError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
MAX_ARRAY_BYTES = 1 << 30  # The covariance of 2,048 features has 34 MB.


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless every array has the size that its header states, within bounds."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > MAX_ARRAY_BYTES:
                raise ValueError(f"{info.filename} has {info.file_size:,} bytes")
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                    raise ValueError(f"{info.filename} is no array of shape {shape}")


def load(path: str | os.PathLike[str]) -> tuple[Gaussian, dict[str, Any]]:
    """Reads statistics written by `save`, pytorch-fid, clean-fid or TTUR.

    Returns:
      Mean and covariance, and the `about` of `save`; {} for files of other programs.

    Raises:
      EvaluationError: no such file, or no matching `mu` and `sigma` in it.
    """
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            mean = np.asarray(file["mu"], np.float64)
            covariance = np.asarray(file["sigma"], np.float64)
            count = int(file["count"]) if "count" in file else 0
            about = json.loads(str(file["about"])) if "about" in file else {}
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"cannot read statistics {path}: {reason}; give an .npz with mu and sigma"
        ) from error
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape and mean.size > 0
    if not fits or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} are not a mean [d] and a "
            "covariance [d, d] of finite numbers"
        )
    return Gaussian(mean, covariance, count), about
