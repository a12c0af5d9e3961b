"""Capital letters as shapes: the distance to their outlines, from a bundled font.

The font is DejaVu Sans Mono Bold 2.37 reduced to its 26 capitals (fonts/LICENSE). Each is a single
connected shape in a cell of the same width. Lengths are in radii, as for the other shapes: a radius
is half the height of a capital, and the origin is the centre of the cell.
"""

from __future__ import annotations

import functools
import pathlib
import string

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

LETTERS = tuple(string.ascii_uppercase.replace("Q", ""))  # Q descends below the baseline.
FONT = pathlib.Path(__file__).with_name("fonts") / "DejaVuSansMono-Bold.ttf"

# The font's em, height of a capital and width of a cell, in its units.
_EM, _CAPITAL, _ADVANCE = 2048, 1493, 1233
CELL = 2 * _ADVANCE / _CAPITAL  # 1.65
EXTENT = 1.05  # Half the height of a letter; round letters exceed the height of a capital.

# Pixels per radius of the distance fields, and their margin around the cell in radii.
_FINE, _RIM = 128, 0.5


def distance(
    letter: str,
    dx: Float[np.ndarray, "..."],
    dy: Float[np.ndarray, "..."],
    radius: float | Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Signed distance to a letter's outline, pixels, negative inside; a lower bound far away.

    Args:
      letter: one of LETTERS.
      dx: pixel centre minus the centre of the cell, rightwards, pixels.
      dy: the same downwards; 0 is half the height of a capital.
      radius: half the height of a capital, pixels; broadcast against `dx` and `dy`.
    """
    field = _field(letter)
    scale = _FINE / radius
    middle = [(side - 1) / 2 for side in field.shape]
    locations = np.broadcast_arrays(dy * scale + middle[0], dx * scale + middle[1])
    found = ndimage.map_coordinates(field, locations, order=1, mode="nearest", output=np.float32)
    return found * radius


@functools.cache
def _field(letter: str) -> Float[np.ndarray, "height width"]:
    """Signed distances to the outline in radii, on a fine grid around the centre of the cell."""
    mask = _glyph(letter)
    outside, inside = (np.asarray(ndimage.distance_transform_edt(m)) for m in (~mask, mask))
    return ((outside - inside) / _FINE).astype(np.float32)


def _glyph(letter: str) -> np.ndarray:
    """A letter as a mask around the centre of its cell, `_FINE` pixels per radius."""
    height, width = (2 * round(_FINE * (side / 2 + _RIM)) for side in (2, CELL))
    sheet = Image.new("L", (width, height))
    font = ImageFont.truetype(str(FONT), round(2 * _FINE * _EM / _CAPITAL))
    foot = (width / 2, height / 2 + _FINE)
    ImageDraw.Draw(sheet).text(foot, letter, fill=255, font=font, anchor="ms")
    return np.asarray(sheet) > 127
