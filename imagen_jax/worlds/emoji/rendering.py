"""Images: OpenMoji's SVG files as 64x64 RGB on white.

OpenMoji's canvas is 72x72 units, of which most emoji leave 5 or more free on each side. The crop is
the same for all, so that the scale is one: units 3 to 69. It cuts at most 3 units off the widest 3
percent. An image is rendered by resvg at four times its size and averaged down.
"""

from __future__ import annotations

import functools
import io
import re

import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.io import images
from imagen_jax.worlds.emoji import catalogue

SIZE = 64
SUPERSAMPLING = 4
MARGIN = 3  # Units of the canvas.
CANVAS = 72


@functools.cache
def png(key: str) -> bytes:
    """The image of an emoji as a PNG file."""
    return images.encode_png(render(key))


def render(key: str, size: int = SIZE) -> UInt8[np.ndarray, "size size 3"]:
    """The image of an emoji.

    Args:
      key: OpenMoji's hex code.
      size: pixels on each side.
    """
    svg = (catalogue.SVG_FOLDER / f"{key}.svg").read_text()
    width = CANVAS - 2 * MARGIN
    view = f'viewBox="{MARGIN} {MARGIN} {width} {width}"'
    svg, count = re.subn(rf'viewBox="0 0 {CANVAS} {CANVAS}"', view, svg, count=1)
    if not count:
        raise ValueError(f"{key}.svg: expected a canvas of {CANVAS}x{CANVAS} units")
    pixels = size * SUPERSAMPLING
    data = resvg_py.svg_to_bytes(
        svg_string=svg, background="#ffffff", width=pixels, height=pixels, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").reduce(SUPERSAMPLING))
