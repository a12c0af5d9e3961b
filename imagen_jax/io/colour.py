"""Colours of an image file as sRGB, by its ICC profile; as colour-managed viewers show it.

lcms converts, with the perceptual intent. A profile that is damaged, too large or of another colour
space than the pixels is ignored, as in browsers. A profile that changes no colour by more than one
level, such as sRGB's own, leaves the pixels as they are.
"""

from __future__ import annotations

import functools
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from imagen_jax.io.png_chunks import MAX_PROFILE_BYTES

# Mode of the pixels -> colour space in the header of a profile.
SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
CONVERTED, IGNORED = "colour profile converted to sRGB", "colour profile ignored"
_INTENT = ImageCms.Intent.PERCEPTUAL


class Managed(NamedTuple):
    """Pixels in sRGB, and a note on the profile; "": there is none, or it changes nothing."""

    image: Image.Image
    note: str


def to_srgb(image: Image.Image, profile: bytes | None) -> Managed:
    """Converts pixels to sRGB.

    Args:
      image: loaded, of mode RGB, L or CMYK.
      profile: ICC profile of the pixels; None: there is none; b"": there is one, but unreadable.

    Returns:
      The image in mode RGB, or unchanged where the profile is absent, ignored or sRGB's.
    """
    if profile is None:
        return Managed(image, "")
    transform = _transform(profile, image.mode) if 0 < len(profile) <= MAX_PROFILE_BYTES else None
    if transform == "identity":
        return Managed(image, "")
    if not isinstance(transform, ImageCms.ImageCmsTransform):
        return Managed(image, IGNORED)
    try:
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, ValueError):
        return Managed(image, IGNORED)
    return Managed(converted or image, CONVERTED)


def is_plain(profile: bytes | None, mode: str) -> bool:
    """Whether `to_srgb` leaves pixels of a mode unchanged."""
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return True
    return not isinstance(_transform(profile, mode), ImageCms.ImageCmsTransform)


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """The transform to sRGB; "identity": it changes nothing; None: the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        opened: Any = source.profile
        if opened.xcolor_space != SPACES.get(mode):
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", _INTENT)
        probe = _probe(mode)
        found = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    same = mode != "CMYK" and np.abs(found - np.asarray(probe.convert("RGB"))).max() <= 1
    return "identity" if same else transform


def _probe(mode: str) -> Image.Image:
    """A sample of all colours of a mode, one row."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.array([0, 1, 17, 51, 85, 119, 153, 187, 221, 254, 255], np.uint8)
    channels = np.stack(np.meshgrid(*[levels] * len(mode), indexing="ij"), -1)
    rows = np.ascontiguousarray(channels.reshape(1, -1, len(mode)))
    return Image.frombytes(mode, (rows.shape[1], 1), rows.tobytes())
