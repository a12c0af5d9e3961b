"""Distances of two feature sets beside the Frechet distance: KID, precision and recall, CMMD.

All run on the host; the sets may differ in size. The caller chooses the network: Inception's pool
for KID, a CLIP for CMMD; for precision and recall the authors use VGG-16, most others Inception.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from imagen_jax.evaluation.samples import EvaluationError

KID_SUBSETS, KID_SIZE = 100, 1000  # Binkowski et al. (arXiv:1801.01401).
NEIGHBOURS = 3
CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0
# Rows per block of a distance matrix: some hundred megabytes for tens of thousands of images.
_ROWS = 1024

Features = Float[np.ndarray, "_ _"]


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


def kid(
    a: Features, b: Features, *, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> Estimate:
    """Kernel Inception distance: unbiased squared MMD under (x.y / d + 1)^3 (arXiv:1801.01401).

    Args:
      a, b: features of two sets.
      subsets: number of random subsets, sampled without replacement; a single estimate is used if
        `size` covers both sets.
      size: images of each set in a subset, at most all of the smaller set.
      seed: seed of the subsets.

    Returns:
      The mean (unbiased: 0 on average for equal distributions, possibly negative) and its standard
      error over subsets, NaN for a single estimate.
    """
    _check(a, b, 2)
    if size >= max(len(a), len(b)):
        return Estimate(_kid_of(np.asarray(a, np.float64), np.asarray(b, np.float64)), np.nan)
    size = min(size, len(a), len(b))
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        parts = [x[rng.choice(len(x), size, replace=False)] for x in (a, b)]
        estimates.append(_kid_of(*(np.asarray(part, np.float64) for part in parts)))
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5 if subsets > 1 else np.nan
    return Estimate(float(np.mean(estimates)), float(error))


def _kid_of(a: Features, b: Features) -> float:
    def kernel(x: Features, y: Features) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Features) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


class PrecisionRecall(NamedTuple):
    """Shares, 0..1.

    Attributes:
      precision: of generated images inside the manifold of the real ones.
      recall: of real images inside the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(
    generated: Features, real: Features, *, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall (arXiv:1904.06991, eq. 1 and 2).

    An image is inside the manifold of a set if its distance to some member is at most that member's
    distance to its k-th nearest neighbour in the set. Both depend on the set sizes; compare sets of
    equal size.

    Args:
      generated, real: features of the two sets, more than `neighbours` images each.
      neighbours: k.
    """
    _check(generated, real, neighbours + 1)
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    precision = _share_inside(generated, real, neighbours)
    return PrecisionRecall(precision, _share_inside(real, generated, neighbours))


def _share_inside(points: Features, others: Features, neighbours: int) -> float:
    radii = np.concatenate(
        [
            # The nearest neighbour is the point itself.
            np.partition(_squared_distances(rows, others), neighbours, axis=1)[:, neighbours]
            for rows in _blocks(others)
        ]
    )
    inside = [(_squared_distances(rows, others) <= radii).any(1) for rows in _blocks(points)]
    return float(np.concatenate(inside).mean())


def cmmd(a: Features, b: Features) -> float:
    """CMMD: squared MMD of CLIP embeddings under a Gaussian kernel, times 1000 (arXiv:2401.09603).

    Embeddings are normalised to length 1; the kernel is exp(-|x - y|^2 / (2 * 10^2)). As in the
    authors' program, the mean includes the pairs of an image with itself, so that a set has
    distance 0 to itself.

    Args:
      a, b: embeddings of two sets. The authors use ViT-L/14 at 336 pixels.
    """
    _check(a, b, 1)
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x: Features, y: Features) -> float:
        sums = [_departure(_squared_distances(rows, y)).sum() for rows in _blocks(x)]
        return sum(sums) / (len(x) * len(y))

    return float(CMMD_SCALE * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def _departure(squares: np.ndarray) -> np.ndarray:
    """Kernel minus 1. The 1 cancels in an MMD; omitting it avoids loss of precision."""
    return np.expm1(-squares / (2 * CMMD_WIDTH**2))


def _blocks(x: Features) -> list[Features]:
    return [x[start : start + _ROWS] for start in range(0, len(x), _ROWS)]


def _squared_distances(x: Features, y: Features) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.maximum(squares, 0)


def _check(a: Features, b: Features, least: int) -> None:
    if a.shape[1] != b.shape[1]:
        raise EvaluationError(
            f"features of size {a.shape[1]} and {b.shape[1]} cannot be compared; use one network"
        )
    if min(len(a), len(b)) < least:
        raise EvaluationError(f"{len(a)} and {len(b)} images; at least {least} of each are needed")
