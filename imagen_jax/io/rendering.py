"""An opened image file as viewers show it: decoded, turned, in sRGB, over a background."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from imagen_jax.io import colour

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
# EXIF orientation -> the transposition that undoes it.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsupportedError(ValueError):
    """The pixels are of a kind that has no RGB values in 0..255."""


def render(
    image: Image.Image, profile: bytes | None, background: Colour = WHITE
) -> tuple[Image.Image, str]:
    """Decodes an opened image to RGB.

    Args:
      image: opened by Pillow.
      profile: ICC profile; see `colour.to_srgb`.
      background: sRGB colour under transparent pixels.

    Returns:
      The image, and a note on its colour profile; "": none.

    Raises:
      UnsupportedError: more than 16 bits per channel, or floating-point pixels.
      Exception: the file is damaged; Pillow's decoders raise many types.
    """
    image.load()
    method = _TRANSPOSITIONS.get(orientation(image))
    if method is not None:
        image = image.transpose(method)
    return _to_rgb(image, profile, background)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 where EXIF is damaged."""
    try:
        # A PNG's own method decodes the file, and nothing would report the damage a second time.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many types; the pixels may be intact.
        return 1
    return value if value in _TRANSPOSITIONS else 1


def _to_rgb(
    image: Image.Image, profile: bytes | None, background: Colour
) -> tuple[Image.Image, str]:
    """The image in sRGB over a background, and a note on its colour profile."""
    if image.mode == "I":  # 32 bits, of which nothing says where white is.
        raise UnsupportedError("more than 16 bits per channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise UnsupportedError("floating-point pixels")
    alpha, grey = None, image.mode in ("L", "LA", "1")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if grey else image.convert("RGB")
    elif image.mode not in colour.SPACES:
        image = image.convert("L" if grey else "RGB")
    image, note = colour.to_srgb(image, profile)
    if image.mode != "RGB":  # `convert` copies all pixels in any case.
        image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image = image.convert("RGB")
    return image, note
