"""The font of the captions in grids of images."""

from __future__ import annotations

import importlib.util
import pathlib

from PIL import ImageFont


def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib; without it Pillow's own font, with few letters.

    Args:
      size: pixels.
    """
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin:
        file = pathlib.Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size=size)
