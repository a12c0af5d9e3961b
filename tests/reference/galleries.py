"""Small galleries of distinct images."""

import numpy as np

SIDE = 12


def tiles(count, side=SIDE, seed=0):
    """Distinct images: coarse random blocks."""
    blocks = np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3))
    return blocks.astype(np.uint8).repeat(side // 4, 1).repeat(side // 4, 2)


def noisy(pixels, sigma=20, seed=1):
    noise = np.random.default_rng(seed).normal(size=pixels.shape) * sigma
    return np.clip(pixels + noise, 0, 255).round().astype(np.uint8)
