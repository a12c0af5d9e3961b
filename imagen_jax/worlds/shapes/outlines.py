"""Outlines of the shapes: signed distances, and the share of a pixel that a shape covers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from imagen_jax.worlds.shapes import letters

# Lengths in radii; the shapes have similar areas at equal size.
SQUARE_HALF = math.sqrt(math.pi) / 2
TRIANGLE_HALF = 1.15
CROSS_ARM = 1.15
CROSS_HALF_WIDTH = 0.4


def coverage(
    shape: str,
    radius: float | Float[np.ndarray, "..."],
    dx: Float[np.ndarray, "..."],
    dy: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Share of a pixel that a shape covers, 0..1, from the signed distance to its outline.

    Args:
      shape: one of `scenes.SHAPES` or `letters.LETTERS`.
      radius: size in pixels, see `scenes.SIZES`; broadcast against `dx` and `dy`.
      dx: pixel centre minus object centre, rightwards, pixels.
      dy: the same downwards.
    """
    return np.clip(0.5 - _DISTANCES[shape](dx, dy, radius), 0, 1)


def _triangle(dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    half = TRIANGLE_HALF * radius
    side = (2 * np.abs(dx) - (dy + half)) / math.sqrt(5)  # outline from (0, -half) to (half, half)
    return np.maximum(side, dy - half)


def _cross(dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    arm, half_width = CROSS_ARM * radius, CROSS_HALF_WIDTH * radius
    dx, dy = np.abs(dx), np.abs(dy)
    flat = np.maximum(dx - arm, dy - half_width)
    upright = np.maximum(dx - half_width, dy - arm)
    return np.minimum(flat, upright)


_DISTANCES: dict[str, Callable[..., np.ndarray]] = {
    "circle": lambda dx, dy, radius: np.sqrt(dx * dx + dy * dy) - radius,
    "square": lambda dx, dy, radius: np.maximum(abs(dx), abs(dy)) - SQUARE_HALF * radius,
    "triangle": _triangle,
    "cross": _cross,
} | {letter: functools.partial(letters.distance, letter) for letter in letters.LETTERS}
