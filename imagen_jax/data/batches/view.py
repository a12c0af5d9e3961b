"""What of a picture an example shows: the square it is made of, the crop, the mirror.

All of it follows from the picture's bytes, the configuration and a few numbers drawn for the
example, so that every way of reading gives the same pixels.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import order
from imagen_jax.io import images

# Words that a mirrored picture would make untrue, whole words in English: left, right, leftmost,
# right-hand, leftwards, right-handed, clockwise and their like; not bright, upright or leftover.
SIDE_WORDS = re.compile(
    r"(?<![a-z])(?:"
    r"(?:left|right)(?:s|most|wards?|wing|wingers?|[ -]?(?:hand|side)(?:ed|er|ers|s)?|ies|y)?"
    r"|(?:anti|counter)?-?clockwise"
    r")(?![a-z])",
    re.IGNORECASE,
)
# Pixels of the source, times the factor of the reduction, that a filter reaches to each side.
FILTER_SUPPORT = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
SQUARE_STREAM, LEFT_STREAM, TOP_STREAM, FLIP_STREAM = range(1, 5)


class Draw(NamedTuple):
    """The random numbers of one example.

    Attributes:
      square: in [0, 1), where along its longer side a picture's square lies.
      left, top: in [0, 1), where in that square the crop lies.
      flip: whether the picture is mirrored if its caption allows that.
    """

    square: float
    left: float
    top: float
    flip: bool


def draws(bits: np.ndarray) -> list[Draw]:
    """The random numbers of examples, from `order.random_bits`."""
    streams = (SQUARE_STREAM, LEFT_STREAM, TOP_STREAM, FLIP_STREAM)
    columns = np.stack([order.uniform(bits, stream) for stream in streams], axis=1).tolist()
    return [Draw(square, left, top, flip < 0.5) for square, left, top, flip in columns]


def is_deterministic(data: DataConfig) -> bool:
    """Whether a picture looks the same in every epoch, but for the mirror."""
    return data.fit != "random_crop" and not data.crop_from


def mentions_side(caption: str) -> bool:
    """Whether a caption says where left and right are."""
    return SIDE_WORDS.search(caption) is not None


def show(
    encoded: bytes,
    data: DataConfig,
    draw: Draw,
    decode_jpeg_box: images.DecodeJpegBox | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """The square that an example shows, before it is mirrored.

    Args:
      encoded: a picture file.
      data: image_size, fit, crop_from, resize_filter.
      draw: of the example.
      decode_jpeg_box: see `images.decode_box`.

    Raises:
      images.ImageError: see `images.decode`.
    """
    if data.crop_from and data.fit != "pad":
        return _crop(encoded, data, draw, decode_jpeg_box)
    image = images.decode(encoded)
    side = data.crop_from or data.image_size
    if data.fit == "pad":
        square = _pad(image, side, data.resize_filter)
    elif data.fit == "random_crop":
        left, top, size = _square(image.shape[1], image.shape[0], draw.square)
        part = image[top : top + size, left : left + size]
        square = images.resize_host(part, side, data.resize_filter)
    else:
        square = images.center_crop_resize(image, side, data.resize_filter)
    if not data.crop_from:
        return square
    left, top = crop_corner(data, draw)
    return square[top : top + data.image_size, left : left + data.image_size]


def crop_corner(data: DataConfig, draw: Draw) -> tuple[int, int]:
    """Left and top of the crop in the picture of side `crop_from`, pixels.

    A crop begins at a whole pixel of the low-resolution picture, so that the crop of the small
    picture is the small picture of the crop.
    """
    step = data.image_size // data.lowres_size if data.lowres_size else 1
    places = (data.crop_from - data.image_size) // step + 1
    return int(draw.left * places) * step, int(draw.top * places) * step


def _square(width: int, height: int, place: float) -> tuple[int, int, int]:
    """Left, top and side of the largest square, at `place` in [0, 1) along the longer side."""
    side = min(width, height)
    return int(place * (width - side + 1)), int(place * (height - side + 1)), side


def _crop(
    encoded: bytes, data: DataConfig, draw: Draw, decode_jpeg_box: images.DecodeJpegBox | None
) -> UInt8[np.ndarray, "size size 3"]:
    """A crop of the picture of side `crop_from`, made of the pixels it needs alone."""
    size, corner = data.image_size, crop_corner(data, draw)
    inner = (0.0, 0.0, 0.0, 0.0)

    def choose(width: int, height: int) -> images.Box:
        """Whole pixels around the crop, as far as the filter reaches; `inner`: the crop in them."""
        nonlocal inner
        left, top, side = _square(width, height, draw.square)
        if data.fit == "center_crop":
            left, top = (width - side) // 2, (height - side) // 2
        scale = side / data.crop_from
        reach = FILTER_SUPPORT[data.resize_filter] * max(scale, 1.0) if scale != 1.0 else 0.0
        starts = [c * scale for c in corner]
        lows = [max(math.floor(start - reach), 0) for start in starts]
        highs = [min(math.ceil(start + size * scale + reach), side) for start in starts]
        begins = [start - low for start, low in zip(starts, lows, strict=True)]
        inner = (*begins, *(begin + size * scale for begin in begins))
        return left + lows[0], top + lows[1], left + highs[0], top + highs[1]

    pixels = images.decode_box(encoded, choose, decode_jpeg_box)
    if inner == (0, 0, size, size):
        return pixels
    # Rounding may put the end a hair beyond the last pixel, which Pillow refuses.
    limits = (pixels.shape[1], pixels.shape[0])
    box = (*inner[:2], min(inner[2], limits[0]), min(inner[3], limits[1]))
    return images.resize_box(pixels, (size, size), data.resize_filter, box)


def _pad(
    image: UInt8[np.ndarray, "h w 3"], side: int, resize_filter: str
) -> UInt8[np.ndarray, "side side 3"]:
    """The whole picture in the middle of a white square; transparency is laid over white too."""
    height, width = image.shape[:2]
    longer = max(height, width)
    new_width, new_height = (max(round(side * n / longer), 1) for n in (width, height))
    small = image
    if (new_width, new_height) != (width, height):
        small = images.resize_box(image, (new_width, new_height), resize_filter)
    square = np.full((side, side, 3), 255, np.uint8)
    left, top = (side - new_width) // 2, (side - new_height) // 2
    square[top : top + new_height, left : left + new_width] = small
    return square


def mirrored(
    examples: UInt8[np.ndarray, "b h w 3"], flips: Int[np.ndarray, " k"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """The examples at `flips` mirrored left to right, in place."""
    examples[flips] = examples[flips][:, :, ::-1]
    return examples
