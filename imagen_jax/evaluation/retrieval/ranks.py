"""Ranks of right answers among the images of a gallery, by exact distances.

An answer is a set of near-duplicate images; its distance is that of its nearest image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import sparse
from scipy.sparse import csgraph

# Products of 1,024 numbers in -128..127 sum to at most 2^24: exact in float32.
_EXACT = 1024
_BLOCK = 2**25  # Distances in memory.
_CELLS = 8  # Blocks per side of the images in the first pass of `near_duplicates`.
Distances = Callable[[slice], Float[np.ndarray, "k m"]]


class Ranking(NamedTuple):
    """Result of comparing n images with a gallery.

    Attributes:
      ranks: rank of each of u sets of right answers, from 1.
      nearest: index of the nearest image of the gallery, the first of equally near ones.
    """

    ranks: Int[np.ndarray, "n u"]
    nearest: Int[np.ndarray, " n"]


def squared_distances(
    images: UInt8[np.ndarray, "n h w 3"], gallery: UInt8[np.ndarray, "m h w 3"]
) -> Float[np.ndarray, "n m"]:
    """Squared Euclidean distances of pixels in levels of 255; exact integers in float64."""
    a, b = images.reshape(len(images), -1), gallery.reshape(len(gallery), -1)
    products = np.zeros((len(a), len(b)))
    norms_a, norms_b = np.zeros(len(a)), np.zeros(len(b))
    for start in range(0, a.shape[1], _EXACT):
        x, y = (c[:, start : start + _EXACT].astype(np.float32) - np.float32(128) for c in (a, b))
        products += x @ y.T
        norms_a += np.einsum("ij,ij->i", x, x)
        norms_b += np.einsum("ij,ij->i", y, y)
    return norms_a[:, None] + norms_b - 2 * products


def near_duplicates(
    gallery: UInt8[np.ndarray, "m h w 3"], threshold: float
) -> Int[np.ndarray, " m"]:
    """Index of the answer of each image.

    Images whose root mean square difference is at most the threshold are one answer, and so are
    images joined by a chain of such pairs. Candidates are found by the sums of blocks of pixels
    over the square roots of the blocks' sizes, whose distances are lower bounds.

    Args:
      gallery: images of one size.
      threshold: levels of 255.
    """
    count, height, width, channels = gallery.shape
    limit = threshold**2 * height * width * channels
    sums, sizes = gallery.astype(np.float32), np.ones((height, width))
    for axis, length in ((1, height), (2, width)):
        starts = np.unique(np.linspace(0, length, min(_CELLS, length), endpoint=False).astype(int))
        sums = np.add.reduceat(sums, starts, axis=axis)
        sizes = np.add.reduceat(sizes, starts, axis=axis - 1)
    coarse = (sums / np.sqrt(sizes)[..., None]).reshape(count, -1).astype(np.float64)
    norms, pairs = (coarse**2).sum(1), []
    for block in _blocks(count, count):
        bounds = norms[block, None] + norms - 2 * coarse[block] @ coarse.T
        first, second = np.nonzero(bounds <= limit + 1e-6 * norms.max())
        first += block.start
        pairs.append(np.stack([first, second])[:, first < second])
    first, second = np.concatenate(pairs, axis=1)
    same = np.array(
        [
            np.square(gallery[i].astype(np.int64) - gallery[j]).sum() <= limit
            for i, j in zip(first, second, strict=True)
        ],
        bool,
    )
    graph = sparse.coo_matrix((np.ones(same.sum()), (first[same], second[same])), (count, count))
    return csgraph.connected_components(graph, directed=False)[1]


def rank(
    count: int,
    distances: Distances,
    answer_of: Int[np.ndarray, " m"],
    sets: Sequence[Sequence[int]],
) -> Ranking:
    """Ranks sets of right answers for every image.

    The rank is 1 plus the number of other answers that are at most as far as the nearest right one:
    equally near answers count as nearer, so an image without content is not right.

    Args:
      count: number of images.
      distances: slice of images -> their distances from the gallery.
      answer_of: answer of each image of the gallery, 0, 1, ...
      sets: u sets of right answers.
    """
    order = np.argsort(answer_of, kind="stable")
    starts = np.searchsorted(answer_of[order], np.arange(answer_of.max() + 1))
    members = [np.unique(answers) for answers in sets]
    ranks = np.zeros((count, len(sets)), np.int32)
    nearest = np.zeros(count, np.int64)
    for block in _blocks(count, len(answer_of)):
        table = distances(block)
        nearest[block] = table.argmin(1)
        by_answer = np.minimum.reduceat(table[:, order], starts, axis=1)
        right = np.stack([by_answer[:, own].min(1) for own in members], axis=1)
        ties = np.stack(
            [(by_answer[:, own] == right[:, u, None]).sum(1) - 1 for u, own in enumerate(members)],
            axis=1,
        )
        by_answer.sort(axis=1)
        within = [
            np.searchsorted(near, own, "right") for near, own in zip(by_answer, right, strict=True)
        ]
        ranks[block] = np.stack(within) - ties
    return Ranking(ranks, nearest)


def _blocks(rows: int, columns: int) -> Iterable[slice]:
    """Slices of the rows whose tables have at most _BLOCK values."""
    step = max(_BLOCK // columns, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
