"""Distances of two feature sets beside the Frechet distance: KID, precision and recall, CMMD.

All run on the host; the sets may differ in size. The caller chooses the network: Inception's pool
for KID, a CLIP for CMMD; for precision and recall the authors use VGG-16, most others Inception.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from imagen_jax.evaluation import intervals
from imagen_jax.evaluation.samples import EvaluationError

NEIGHBOURS = 3
CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0
# Rows per block of a distance matrix: some hundred megabytes for tens of thousands of images.
_ROWS = 1024

Features = Float[np.ndarray, "_ _"]


class Estimate(NamedTuple):
    """A value, its standard error over new images of both sets, and its 95% interval."""

    value: float
    error: float
    low: float
    high: float


class _Sums(NamedTuple):
    """Sums over a kernel matrix: of each row, of each column, of squares."""

    rows: np.ndarray
    columns: np.ndarray
    squares: float


def kid(a: Features, b: Features) -> Estimate:
    """Kernel Inception distance: unbiased squared MMD under (x.y / d + 1)^3 (arXiv:1801.01401).

    One estimate from all pairs. The authors average estimates of random subsets, with the same
    expectation; the spread of these is no standard error, because subsets share their images.

    The standard error is that of a two-sample U-statistic (Hoeffding 1948): the variance of the
    projections on single images, and that of the remainders of pairs, which is all that is left
    where the distributions are equal. Both are estimated without bias.

    The interval holds from 32 features and 100 images on (docs/evaluation.md). With fewer, a sum of
    few squares carries the distance and its estimated variance: the interval ends too low where the
    features changed, and is too wide where they are equal.

    Args:
      a, b: features of two sets, at least four images each.
    """
    _check(a, b, 4)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, m = len(a), len(b)
    own_a, own_b, cross = _kernel_sums(a, a), _kernel_sums(b, b), _kernel_sums(a, b)
    means_a, means_b = own_a.rows / (n - 1), own_b.rows / (m - 1)
    value = means_a.mean() + means_b.mean() - 2 * cross.rows.sum() / (n * m)
    pairs_a, pairs_b = _remainder_within(own_a, n), _remainder_within(own_b, m)
    total, rows, columns = cross.rows.sum(), (cross.rows**2).sum(), (cross.columns**2).sum()
    pairs = (cross.squares - rows / m - columns / n + total**2 / (n * m)) / ((n - 1) * (m - 1))
    single_a = (means_a - cross.rows / m).var(ddof=1)
    single_b = (means_b - cross.columns / n).var(ddof=1)
    jackknife = 4 * single_a / n + 4 * single_b / m  # Holds the variance of pairs twice.
    of_pairs = 2 * max(pairs_a, 0) / (n * (n - 1)) + 2 * max(pairs_b, 0) / (m * (m - 1))
    of_pairs += 4 * max(pairs, 0) / (n * m)
    error = math.sqrt(max(jackknife - of_pairs, of_pairs / 2))
    # The interval is that of the biased estimate, which includes the pairs of an image with itself.
    bias = (_own_pairs(a) - means_a.mean()) / n + (_own_pairs(b) - means_b.mean()) / m
    low, high = intervals.squared_distance(
        max(float(value + bias), 0.0),
        jackknife=float(jackknife),
        second=float(of_pairs),
        bias=float(bias),
        freedom=min(n, m) - 1,
    )
    return Estimate(float(value), error, low - float(bias), high - float(bias))


def _own_pairs(x: Features) -> float:
    """Mean kernel of an image with itself."""
    return float((((x**2).mean(1) + 1) ** 3).mean())


def _kernel_sums(x: Features, y: Features) -> _Sums:
    """Sums over the kernel of two sets; of a set with itself, without the pairs of an image."""
    rows, columns, squares = [], np.zeros(len(y)), 0.0
    for start in range(0, len(x), _ROWS):
        block = (x[start : start + _ROWS] @ y.T / x.shape[1] + 1) ** 3
        if x is y:
            block[np.arange(len(block)), start + np.arange(len(block))] = 0
        rows.append(block.sum(1))
        columns += block.sum(0)
        squares += float((block**2).sum())
    return _Sums(np.concatenate(rows), columns, squares)


def _remainder_within(sums: _Sums, n: int) -> float:
    """Variance of a kernel of pairs without the effects of single images, unbiased.

    Szekely & Rizzo 2014, "Partial distance correlation", Sec. 3 (U-centred matrices).
    """
    effects = 2 / (n - 2) * (sums.rows**2).sum() - sums.rows.sum() ** 2 / ((n - 1) * (n - 2))
    return float((sums.squares - effects) / (n * (n - 3)))


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
