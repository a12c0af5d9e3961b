"""The order of the data: a stateless permutation of the example index g."""

from __future__ import annotations

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


def random_bits(g: Int[np.ndarray, " k"], seed: int) -> UInt64[np.ndarray, " k"]:
    """64 random bits for each example.

    Uses another hash than the permutation: augmentations must not depend on the record.
    """
    return mix(mix(g.astype(np.uint64) + GOLDEN) ^ np.uint64(seed % 2**64))


def uniform(bits: UInt64[np.ndarray, " k"], stream: int) -> Float[np.ndarray, " k"]:
    """Uniform numbers in [0, 1) from the bits of examples; streams are independent."""
    offset = np.uint64(stream * int(GOLDEN) % 2**64)
    return (mix(bits + offset) >> np.uint64(11)) * 2.0**-53
