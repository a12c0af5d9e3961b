"""A figure of generated images, each beside the real image of its prompt."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from imagen_jax.evaluation import samples
from imagen_jax.io import fonts, images

SIDE = 128  # Of each image, pixels.
GAP = 4  # Between the two images of a pair, pixels.
COLUMNS = 6
LINE, FONT = 24, 14  # Height of a line of the header and footer, and its font size, pixels.
HEADER = "left: generated, right: real"


def make_grid(
    samples_dir: str | os.PathLike[str],
    gallery_dir: str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    *,
    limit: int,
    credit: str = "",
) -> UInt8[np.ndarray, "rows cols 3"]:
    """Pairs of the first rows, the prompt under each.

    Args:
      samples_dir: folder written by `sample`.
      gallery_dir: folder of the real images.
      results: `rows` of a report of `Retrieval.evaluate`.
      limit: number of pairs.
      credit: text at the bottom; "": none.
    """
    shown = results[:limit]
    pairs, prompts = [], []
    for row in shown:
        own = _square(samples.load(samples_dir, row["file"]))
        real = _square(samples.load(gallery_dir, row["right"]))
        pairs.append(np.concatenate([own, np.full((SIDE, GAP, 3), 255, np.uint8), real], axis=1))
        prompts.append(row["prompt"])
    sheet = images.grid(np.stack(pairs), min(COLUMNS, len(pairs)), prompts)
    parts = [_text(HEADER, sheet.shape[1]), sheet]
    if credit:
        parts.append(_text(credit, sheet.shape[1]))
    return np.concatenate(parts)


def _square(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "side side 3"]:
    """The whole image on white; pixels stay squares where an integer factor enlarges them."""
    height, width, _ = image.shape
    longer = max(height, width)
    size = max(round(width * SIDE / longer), 1), max(round(height * SIDE / longer), 1)
    if SIDE % longer == 0:
        resized = image.repeat(SIDE // longer, axis=0).repeat(SIDE // longer, axis=1)
    else:
        resized = images.resize_box(image, size, "box" if longer > SIDE else "bicubic")
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square


def _text(text: str, width: int) -> UInt8[np.ndarray, "lines width 3"]:
    """Text on white, wrapped to the width."""
    font = fonts.label_font(FONT)
    lines = textwrap.wrap(text, max(int((width - 2 * GAP) / font.getlength("n")), 1))
    canvas = Image.new("RGB", (width, LINE * len(lines)), "white")
    for number, line in enumerate(lines):
        at = (GAP, LINE * number + GAP)
        ImageDraw.Draw(canvas).text(at, line, fill="black", font=font)
    return np.asarray(canvas)
