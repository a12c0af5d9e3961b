"""How a picture becomes Inception's 299 x 299 input: the filters of the known FID programs.

The filter alone moves an FID by several units (Parmar et al. 2022, arXiv:2104.11222), so that a
card names it, and statistics made with one are refused for another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.models.inception import INPUT_SIZE

Pixels = UInt8[np.ndarray, "h w 3"]
Input = Float[np.ndarray, "_ _ 3"]


def clean(picture: Pixels) -> Input:
    """clean-fid: bicubic with antialiasing, not rounded, clipped to 0..255; (x - 128) / 128."""
    size = (INPUT_SIZE, INPUT_SIZE)
    channels = [
        Image.fromarray(picture[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    pixels = np.stack([np.asarray(channel) for channel in channels], -1)
    return (np.clip(pixels, 0, 255) - 128) / np.float32(128)


def tf(picture: Pixels) -> Input:
    """TTUR and the 2015 graph: TensorFlow 1's bilinear resize, no antialiasing; (x - 128) / 128.

    Output pixel i is sampled at i * size / 299, corner to corner rather than centre to centre.
    """
    steps = np.arange(INPUT_SIZE, dtype=np.float32)
    places = [steps * np.float32(n / INPUT_SIZE) for n in picture.shape[:2]]
    return (_bilinear(picture, *places) - 128) / np.float32(128)


def pytorch(picture: Pixels) -> Input:
    """pytorch-fid: torch's bilinear interpolation, no antialiasing; 2x / 255 - 1."""
    centres = np.arange(INPUT_SIZE, dtype=np.float32) + np.float32(0.5)
    places = [centres * np.float32(n / INPUT_SIZE) - np.float32(0.5) for n in picture.shape[:2]]
    return _bilinear(picture, *places) * np.float32(2 / 255) - np.float32(1)


FILTERS: dict[str, Callable[[Pixels], Input]] = {"clean": clean, "tf": tf, "pytorch": pytorch}


def _bilinear(
    picture: Pixels, rows: Float[np.ndarray, " i"], columns: Float[np.ndarray, " j"]
) -> Float[np.ndarray, "i j 3"]:
    """Values between pixels; beyond the border its pixels go on.

    Places are float32, as in the programs that are followed: a place that is off by 3e-5 of a pixel
    shows in the fourth digit of a noisy picture.
    """

    def between(x: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
        places = np.clip(places, 0, x.shape[axis] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        part = (places - low).astype(np.float32).reshape(shape)
        return x.take(low, axis) * (1 - part) + x.take(high, axis) * part

    return between(between(picture.astype(np.float32), rows, 0), columns, 1)
