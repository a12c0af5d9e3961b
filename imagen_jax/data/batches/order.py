"""The order of the data: a stateless permutation of the example index g."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, Int, UInt64

ROUNDS = 6  # Of the Feistel network; four already give a pseudorandom permutation.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """A bijective hash of uint64 values (SplitMix64's finaliser, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    position: Int[np.ndarray, " k"], epoch: Int[np.ndarray, " k"], *, n: int, seed: int
) -> Int[np.ndarray, " k"]:
    """The record at each position of the shuffled order of its epoch, without storing the order.

    A Feistel network permutes the smallest range of an even number of bits that includes n; results
    of n or more are permuted again (cycle walking).

    Args:
      position: 0..n-1.
      epoch: epoch of each position, at least 0.
      n: size of the data set.
      seed: selects the family of permutations.

    Returns:
      0..n-1; for any one epoch and seed a bijection of `position`.
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    low = np.uint64((1 << int(half)) - 1)
    start = mix(np.full(len(epoch), seed % 2**64, np.uint64)) + epoch.astype(np.uint64)
    keys = [mix(start * GOLDEN + np.uint64(round_)) for round_ in range(ROUNDS)]

    value = position.astype(np.uint64)
    pending = np.arange(len(value))
    while len(pending):
        left, right = value[pending] >> half, value[pending] & low
        for key in keys:
            left, right = right, left ^ (mix(right + key[pending]) & low)
        value[pending] = (left << half) | right
        pending = pending[value[pending] >= n]
    return value.astype(np.int64)


WINDOW = 1 << 16  # Records that are shuffled together by `permute_in_windows`.
_WINDOW_STREAM = 1 << 44  # Added to the seed: windows and shards get different permutations.


def permute_in_windows(
    position: Int[np.ndarray, " k"],
    epoch: Int[np.ndarray, " k"],
    *,
    ends: Int[np.ndarray, " shards"],
    seed: int,
    window: int = WINDOW,
) -> Int[np.ndarray, " k"]:
    """Like `permute`, but neighbouring positions are in few shards.

    In each epoch the shards are put in random order, and the records, in that order, are shuffled
    within windows of equal size.

    Args:
      position: 0..n-1, n the last of `ends`.
      epoch: epoch of each position, at least 0.
      ends: for each shard the number of the first record after it.
      seed: selects the family of permutations.
      window: records that are shuffled together.

    Returns:
      0..n-1; for any one epoch and seed a bijection of `position`.
    """
    n, result = int(ends[-1]), np.empty_like(position)
    number = position // window
    within = np.empty_like(position)
    # The last window is smaller, so its permutation is another.
    for size in {min(window, n), n - (n - 1) // window * window}:
        same = np.minimum(n - number * window, window) == size
        keys = epoch[same] * (-(-n // window)) + number[same]
        at = position[same] % window
        within[same] = permute(at, keys, n=size, seed=seed + _WINDOW_STREAM)
    place = number * window + within
    counts = np.diff(ends, prepend=0)
    for one in np.unique(epoch):
        order = _shard_order(len(ends), int(one), seed)
        stops = np.cumsum(counts[order])
        chosen = epoch == one
        slot = np.searchsorted(stops, place[chosen], side="right")
        shard = order[slot]
        result[chosen] = place[chosen] - stops[slot] + ends[shard]
    return result


@functools.lru_cache(8)
def _shard_order(count: int, epoch: int, seed: int) -> Int[np.ndarray, " count"]:
    """The shards in the order of an epoch; the same for all of its batches."""
    return permute(np.arange(count), np.full(count, epoch), n=count, seed=seed)


def random_bits(g: Int[np.ndarray, " k"], seed: int) -> UInt64[np.ndarray, " k"]:
    """64 random bits for each example.

    Uses another hash than the permutation: augmentations must not depend on the record.
    """
    return mix(mix(g.astype(np.uint64) + GOLDEN) ^ np.uint64(seed % 2**64))


def uniform(bits: UInt64[np.ndarray, " k"], stream: int) -> Float[np.ndarray, " k"]:
    """Uniform numbers in [0, 1) from the bits of examples; streams are independent."""
    offset = np.uint64(stream * int(GOLDEN) % 2**64)
    return (mix(bits + offset) >> np.uint64(11)) * 2.0**-53
