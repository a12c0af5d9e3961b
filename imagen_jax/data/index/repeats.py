"""Which records repeat another, as pairs of record numbers: pure functions on keys.

Equal keys have equal hashes, so a part of the keys that share a hash, or of those that share a band
of a perceptual hash, gives its pairs without the other parts. `resolve` joins the pairs of all
parts. `duplicates.py` has one part; `data/beam/duplicates.py` one per worker's group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

MAX_DISTANCE = 16  # Signs of 256; unrelated images differ in about half.
KEY_BYTES, BANDS = 32, 8
KEY = f"S{KEY_BYTES}"
_BAND_BYTES = KEY_BYTES // BANDS


class Keyed(NamedTuple):
    """Records of a part.

    Attributes:
      numbers: of the records, int64[n].
      keys: of the records, S32[n].
    """

    numbers: np.ndarray
    keys: np.ndarray


class Repeats(NamedTuple):
    """All records that repeat another, directly or through others.

    Attributes:
      numbers: of the records, ascending, the first of each group included.
      firsts: for each the number of the first record of its group.
    """

    numbers: np.ndarray
    firsts: np.ndarray


def equal(found: Keyed) -> tuple[Keyed, np.ndarray]:
    """The first record of each key, by key, and a pair int64[k, 2] for each further record."""
    by_number = np.argsort(found.numbers, kind="stable")
    numbers, keys = found.numbers[by_number], found.keys[by_number]
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    further = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    pairs = np.stack([numbers[further], numbers[first[inverse[further]]]], axis=1)
    return Keyed(numbers[first], distinct), pairs


def near(distinct: Keyed, band: int) -> np.ndarray:
    """Pairs of records that share a band of their keys and differ in at most MAX_DISTANCE bits.

    Records are compared with the one of the smallest key among those of the same band.

    Args:
      distinct: records with different keys.
      band: 0..BANDS - 1.
    """
    by_key = np.argsort(distinct.keys, kind="stable")
    numbers, keys = distinct.numbers[by_key], distinct.keys[by_key]
    values = band_values(keys, band)
    order = np.argsort(values, kind="stable")
    values = values[order]
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] ^ 1))
    firsts = order[np.repeat(starts, np.diff(starts, append=len(values)))]
    others, firsts = order[order != firsts], firsts[order != firsts]
    bits = _bytes(keys)
    differing = np.bitwise_count(bits[others] ^ bits[firsts]).sum(axis=1)
    close = differing <= MAX_DISTANCE
    return np.stack([numbers[others[close]], numbers[firsts[close]]], axis=1)


def band_values(keys: np.ndarray, band: int) -> np.ndarray:
    """The bits of a band of each key, uint32[n]."""
    columns = _bytes(keys)[:, band * _BAND_BYTES : (band + 1) * _BAND_BYTES]
    return np.ascontiguousarray(columns).view("<u4")[:, 0]


def pairs(found: Keyed, kind: str) -> np.ndarray:
    """All pairs of one part that holds all records; `kind`: of the keys."""
    distinct, result = equal(found)
    if kind != "pixels":
        return result
    return np.concatenate([result, *(near(distinct, band) for band in range(BANDS))])


def resolve(found: np.ndarray) -> Repeats:
    """Joins pairs to groups; the order of the pairs does not matter."""
    if not len(found):
        return Repeats(np.zeros(0, np.int64), np.zeros(0, np.int64))
    numbers, ends = np.unique(found, return_inverse=True)
    ends = ends.reshape(-1, 2)
    shape = (len(numbers), len(numbers))
    graph = sparse.coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape)
    labels = sparse.csgraph.connected_components(graph, directed=False)[1]
    first = np.unique(labels, return_index=True)[1]
    return Repeats(numbers, numbers[first[labels]])


def _bytes(keys: np.ndarray) -> np.ndarray:
    """Keys as u1[n, 32]."""
    return np.ascontiguousarray(keys, KEY).view(np.uint8).reshape(-1, KEY_BYTES)
