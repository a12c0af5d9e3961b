"""Resizing to Inception's 299 x 299 input: the filters of the common FID programs.

`cleanfid` and `bicubic` are one filter on different images: clean-fid resizes an image of any size
and shape to 299 x 299 at once; `bicubic`, called `clean` in earlier versions, gets the square of
`--size` pixels that `tf` and `pytorch` get.

The filter alone changes an FID by several units (Parmar et al. 2022, arXiv:2104.11222). A card
records the filter, and saved statistics of another filter are rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.models.inception import INPUT_SIZE

Pixels = UInt8[np.ndarray, "h w 3"]
Input = Float[np.ndarray, "_ _ 3"]


def bicubic(image: Pixels) -> Input:
    """clean-fid: bicubic with antialiasing, not rounded, clipped to 0..255; (x - 128) / 128.

    cleanfid/resize.py, make_resizer("PIL", False, "bicubic", (299, 299)); the aspect ratio is lost.
    """
    size = (INPUT_SIZE, INPUT_SIZE)
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    pixels = np.stack([np.asarray(channel) for channel in channels], -1)
    return (np.clip(pixels, 0, 255) - 128) / np.float32(128)


def tf(image: Pixels) -> Input:
    """TTUR and the 2015 graph: TensorFlow 1's bilinear resize, no antialiasing; (x - 128) / 128.

    Output pixel i is sampled at i * size / 299, corner to corner rather than centre to centre.
    """
    steps = np.arange(INPUT_SIZE, dtype=np.float32)
    locations = [steps * np.float32(n / INPUT_SIZE) for n in image.shape[:2]]
    return (_bilinear(image, *locations) - 128) / np.float32(128)


def pytorch(image: Pixels) -> Input:
    """pytorch-fid: torch's bilinear interpolation, no antialiasing; 2x / 255 - 1."""
    centres = np.arange(INPUT_SIZE, dtype=np.float32) + np.float32(0.5)
    locations = [centres * np.float32(n / INPUT_SIZE) - np.float32(0.5) for n in image.shape[:2]]
    return _bilinear(image, *locations) * np.float32(2 / 255) - np.float32(1)


FILTERS: dict[str, Callable[[Pixels], Input]] = {
    "bicubic": bicubic,
    "cleanfid": bicubic,
    "tf": tf,
    "pytorch": pytorch,
}
DEFAULT_FILTER = "bicubic"
NATIVE = ("cleanfid",)  # Filters of whole images at their own size.
_OLD_NAMES = {"clean": "bicubic"}


def filter_name(name: str) -> str:
    """Today's name of a filter; an earlier name stays valid."""
    return _OLD_NAMES.get(name, name)


def _bilinear(
    image: Pixels, rows: Float[np.ndarray, " i"], columns: Float[np.ndarray, " j"]
) -> Float[np.ndarray, "i j 3"]:
    """Bilinear interpolation; locations are clamped to the border.

    Locations are float32, as in the reference programs: an offset of 3e-5 pixels changes the fourth
    digit of a noisy image.
    """

    def between(x: np.ndarray, locations: np.ndarray, axis: int) -> np.ndarray:
        locations = np.clip(locations, 0, x.shape[axis] - 1)
        low = np.floor(locations).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        part = (locations - low).astype(np.float32).reshape(shape)
        return x.take(low, axis) * (1 - part) + x.take(high, axis) * part

    return between(between(image.astype(np.float32), rows, 0), columns, 1)
