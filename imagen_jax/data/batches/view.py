"""The view of an image that an example holds: square, crop and mirroring.

It depends on the bytes of the image, the configuration and a few random numbers of the example, so
all loaders give the same pixels.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import order
from imagen_jax.io import images

# English words that do not hold for a mirrored image: left, right, leftmost, right-hand, leftwards,
# right-handed, clockwise and the like, as whole words; not bright, upright or leftover.
SIDE_WORDS = re.compile(
    r"(?<![a-z])(?:"
    r"(?:left|right)(?:s|most|wards?|wing|wingers?|[ -]?(?:hand|side)(?:ed|er|ers|s)?|ies|y)?"
    r"|(?:anti|counter)?-?clockwise"
    r")(?![a-z])",
    re.IGNORECASE,
)
# Radius of each filter in pixels of the source, times the reduction factor.
FILTER_SUPPORT = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
SQUARE_STREAM, LEFT_STREAM, TOP_STREAM, FLIP_STREAM, CAPTION_STREAM = range(1, 6)


class Augmentation(NamedTuple):
    """The random numbers of one example.

    Attributes:
      square: in [0, 1), position of the square along the longer side of the image.
      left, top: in [0, 1), position of the crop in the square.
      flip: whether the image is mirrored, if its caption allows it.
    """

    square: float
    left: float
    top: float
    flip: bool


def sample_augmentations(bits: np.ndarray) -> list[Augmentation]:
    """Samples the augmentations of examples from `order.random_bits`."""
    streams = (SQUARE_STREAM, LEFT_STREAM, TOP_STREAM, FLIP_STREAM)
    columns = np.stack([order.uniform(bits, stream) for stream in streams], axis=1).tolist()
    return [Augmentation(square, left, top, flip < 0.5) for square, left, top, flip in columns]


class Captions(NamedTuple):
    """The captions of an image and their weights; (): equal ones."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def choose_captions(bits: UInt64[np.ndarray, " k"], captions: Sequence[Captions]) -> list[str]:
    """Samples the caption of every example from `order.random_bits`."""
    uniform = order.uniform(bits, CAPTION_STREAM).tolist()
    chosen = []
    for (texts, weights), number, u in zip(captions, bits.tolist(), uniform, strict=True):
        if not weights:
            chosen.append(texts[number % len(texts)])
            continue
        ends = list(itertools.accumulate(weights))
        chosen.append(texts[bisect.bisect_right(ends[:-1], u * ends[-1])])
    return chosen


def is_deterministic(data: DataConfig) -> bool:
    """Whether an image gives the same square in every epoch, up to mirroring."""
    return data.fit != "random_crop" and not data.crop_from


def mentions_side(caption: str) -> bool:
    """Whether a caption mentions left, right or a sense of rotation."""
    return SIDE_WORDS.search(caption) is not None


def decode_view(
    encoded: bytes,
    data: DataConfig,
    augmentation: Augmentation,
    decode_jpeg_box: images.DecodeJpegBox | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Decodes the square of an example, before mirroring.

    Args:
      encoded: an image file.
      data: image_size, fit, crop_from, resize_filter.
      augmentation: of the example.
      decode_jpeg_box: see `images.decode_box`.

    Raises:
      images.ImageError: see `images.decode`.
    """
    if data.crop_from and data.fit != "pad":
        return _crop(encoded, data, augmentation, decode_jpeg_box)
    with images.decoded(encoded, data.background_rgb()) as image:
        # A copy where this is a part of the image: the pixels count no longer.
        return np.array(_whole_view(image, data, augmentation))


def _whole_view(
    image: UInt8[np.ndarray, "h w 3"], data: DataConfig, augmentation: Augmentation
) -> UInt8[np.ndarray, "size size 3"]:
    """`decode_view` of decoded pixels."""
    side = data.crop_from or data.image_size
    if data.fit == "pad":
        square = _pad(image, side, data.resize_filter, data.background_rgb())
    elif data.fit == "random_crop":
        left, top, size = _square(image.shape[1], image.shape[0], augmentation.square)
        part = image[top : top + size, left : left + size]
        square = images.resize_host(part, side, data.resize_filter)
    else:
        square = images.center_crop_resize(image, side, data.resize_filter)
    if not data.crop_from:
        return square
    left, top = crop_corner(data, augmentation)
    return square[top : top + data.image_size, left : left + data.image_size]


def crop_corner(data: DataConfig, augmentation: Augmentation) -> tuple[int, int]:
    """Left and top of the crop in the image of side `crop_from`, pixels.

    Crop offsets are multiples of the upsampling factor, so cropping and downsampling commute.
    """
    step = data.image_size // data.lowres_size if data.lowres_size else 1
    positions = (data.crop_from - data.image_size) // step + 1
    return int(augmentation.left * positions) * step, int(augmentation.top * positions) * step


def _square(width: int, height: int, position: float) -> tuple[int, int, int]:
    """Left, top and side of the largest square, at `position` in [0, 1) along the longer side."""
    side = min(width, height)
    return int(position * (width - side + 1)), int(position * (height - side + 1)), side


def _crop(
    encoded: bytes,
    data: DataConfig,
    augmentation: Augmentation,
    decode_jpeg_box: images.DecodeJpegBox | None,
) -> UInt8[np.ndarray, "size size 3"]:
    """A crop of the image of side `crop_from`; resizes only the pixels of the crop."""
    size, corner = data.image_size, crop_corner(data, augmentation)
    inner = (0.0, 0.0, 0.0, 0.0)

    def choose(width: int, height: int) -> images.Box:
        """Whole pixels within the radius of the filter; sets `inner`, the crop within them."""
        nonlocal inner
        left, top, side = _square(width, height, augmentation.square)
        if data.fit == "center_crop":
            left, top = (width - side) // 2, (height - side) // 2
        scale = side / data.crop_from
        support = FILTER_SUPPORT[images.filter_for(data.resize_filter, scale)]
        reach = support * max(scale, 1.0) if scale != 1.0 else 0.0
        starts = [c * scale for c in corner]
        lows = [max(math.floor(start - reach), 0) for start in starts]
        highs = [min(math.ceil(start + size * scale + reach), side) for start in starts]
        begins = [start - low for start, low in zip(starts, lows, strict=True)]
        inner = (*begins, *(begin + size * scale for begin in begins))
        return left + lows[0], top + lows[1], left + highs[0], top + highs[1]

    pixels = images.decode_box(encoded, choose, decode_jpeg_box, data.background_rgb())
    if inner == (0, 0, size, size):
        return pixels
    # Rounding may put the end slightly beyond the last pixel, which Pillow rejects.
    limits = (pixels.shape[1], pixels.shape[0])
    box = (*inner[:2], min(inner[2], limits[0]), min(inner[3], limits[1]))
    return images.resize_box(pixels, (size, size), data.resize_filter, box)


def _pad(
    image: UInt8[np.ndarray, "h w 3"], side: int, resize_filter: str, background: images.Colour
) -> UInt8[np.ndarray, "side side 3"]:
    """The whole image centred in a square of one colour."""
    height, width = image.shape[:2]
    longer = max(height, width)
    new_width, new_height = (max(round(side * n / longer), 1) for n in (width, height))
    resized = image
    if (new_width, new_height) != (width, height):
        resized = images.resize_box(image, (new_width, new_height), resize_filter)
    square = np.full((side, side, 3), background, np.uint8)
    left, top = (side - new_width) // 2, (side - new_height) // 2
    square[top : top + new_height, left : left + new_width] = resized
    return square


def mirror_in_place(
    examples: UInt8[np.ndarray, "b h w 3"], flips: Int[np.ndarray, " k"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """Mirrors the examples at `flips` left to right, in place; returns all examples."""
    examples[flips] = examples[flips][:, :, ::-1]
    return examples
