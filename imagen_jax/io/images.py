"""Images as arrays: bytes -> uint8 -> [-1, 1] and back, resizing, crops, grids, PNG files.

Used by the data pipeline (decoding, cropping and resizing on the host), the cascade (`upsample` on
the device, `to_uint8` at its end) and the reports (`grid`, `save_png`).

Paper is silent: resize filters. Host resizing is antialiased.
"""

from __future__ import annotations

import contextlib
import io
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import (
    ExifTags,
    Image,
    ImageDraw,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)

from imagen_jax.io import atomic

AnyArray = TypeVar("AnyArray", Array, np.ndarray)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the latter two exclusive
# A JPEG file and a rectangle -> the pixels; raises ImageError if it cannot decode the file.
DecodeJpegBox = Callable[[bytes, Box], np.ndarray]

# Larger images are mistakes or attacks; Pillow would only warn.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

RESIZE_FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(ValueError):
    """Bytes are not a usable image; the message gives the reason in a few words."""


def to_float(image: UInt8[AnyArray, "*b 3"]) -> Float[AnyArray, "*b 3"]:
    """Maps uint8 0..255 to float32 [-1, 1], NumPy in NumPy out, JAX in JAX out.

    The numerator 2x - 255 is exact and the product rounds once, so NumPy, XLA and TensorFlow give
    the same bits with any fusion.

    Args:
      image: pixels, any leading shape.

    Returns:
      float32 of the same shape, (2x - 255) / 255.
    """
    xp: Any = jnp if isinstance(image, jax.Array) else np
    return (image.astype(xp.int32) * 2 - 255).astype(xp.float32) * xp.float32(1 / 255)


def to_uint8(image: Float[AnyArray, "*b 3"]) -> UInt8[AnyArray, "*b 3"]:
    """Inverse of `to_float`: rounds to the nearest of 0..255; clips to [-1, 1]."""
    xp: Any = jnp if isinstance(image, jax.Array) else np
    return xp.clip(xp.round((image + 1.0) * 127.5), 0.0, 255.0).astype(xp.uint8)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to RGB as viewers show it.

    Applies EXIF orientation, composites transparency over white, scales 16-bit grey to 8 bits,
    converts CMYK and palettes, and takes the first frame of an animation. The format is detected
    from the content.

    Raises:
      ImageError: empty, damaged or truncated data, not an image, or more than MAX_PIXELS.
    """
    with _opened(data) as image:
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Opens an image and reads its header; all errors in the context become ImageError."""
    if not data:
        raise ImageError("unreadable (empty)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"too large ({size} px, at most {MAX_PIXELS:,} in all)")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("wrong type (not an image)") from None
    except Image.DecompressionBombError:
        raise ImageError(f"too large (at most {MAX_PIXELS:,} pixels in all)") from None
    # The parsers of Pillow's plug-ins raise many types, SyntaxError included.
    except Exception as error:
        raise ImageError(f"unreadable ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise ImageError("wrong type (more than 16 bits per channel)")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("wrong type (floating-point pixels)")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class ImageInfo(NamedTuple):
    """Properties of an image file.

    Attributes:
      size: width and height after EXIF rotation, pixels.
      format: name in Pillow, such as JPEG.
      notes: conversions that `decode` applies.
    """

    size: tuple[int, int]
    format: str
    notes: tuple[str, ...]


def inspect_image(data: bytes, mode: str) -> ImageInfo:
    """Checks an image file.

    Args:
      data: the file.
      mode: "decode" checks the whole file; "header" only the header, which misses later damage.

    Raises:
      ImageError: see `decode`.
    """
    with _opened(data) as image:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        is_16_bit = image.mode.startswith("I") or any(
            ";16" in str(t.args) for t in getattr(image, "tile", ())
        )
        # MPO: a JPEG followed by a second one, written by phones.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        notes = {
            "rotated by EXIF": rotated,
            "converted from CMYK": image.mode == "CMYK",
            "converted from 16 bits": is_16_bit,
            f"first frame alone (of {frames})": frames > 1,
            "transparency over white": image.has_transparency_data,
        }
        size = image.size
        if rotated and image.getexif()[ExifTags.Base.Orientation] > 4:
            size = (image.height, image.width)
        if mode == "decode":
            image.load()
            size = _to_rgb(ImageOps.exif_transpose(image)).size
        found = tuple(note for note, applies in notes.items() if applies)
        return ImageInfo(size, image.format or "", found)


def decode_box(
    data: bytes, choose: Callable[[int, int], Box], decode_jpeg_box: DecodeJpegBox | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a rectangle of an image; equals that part of `decode`.

    Args:
      data: an image file.
      choose: width and height in pixels -> the rectangle.
      decode_jpeg_box: decodes only a rectangle of a JPEG, to the same pixels; None: decodes the
        whole image.

    Raises:
      ImageError: see `decode`.
    """
    if decode_jpeg_box is not None:
        with _opened(data) as image:
            plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            width, height = image.size
        if plain and not rotated:
            left, top, right, bottom = choose(width, height)
            # Chroma is interpolated between neighbours: one more pixel on each side.
            outer = (max(left - 1, 0), max(top - 1, 0), min(right + 1, width))
            outer = (*outer, min(bottom + 1, height))
            with contextlib.suppress(ImageError):
                pixels = decode_jpeg_box(data, outer)
                y, x = top - outer[1], left - outer[0]
                return pixels[y : y + bottom - top, x : x + right - left]
    pixels = decode(data)
    left, top, right, bottom = choose(pixels.shape[1], pixels.shape[0])
    return pixels[top:bottom, left:right]


def resize_box(
    image: UInt8[np.ndarray, "h w 3"],
    size: tuple[int, int],
    filter: str,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes a rectangle of an image with an antialiased filter.

    Args:
      image: pixels; the filter also reads pixels around the rectangle.
      size: width and height of the result, pixels.
      filter: a row of RESIZE_FILTERS.
      box: left, top, right, bottom in pixels, fractions allowed; None: the whole image.
    """
    return np.asarray(Image.fromarray(image).resize(size, RESIZE_FILTERS[filter], box=box))


def resize_host(
    image: UInt8[np.ndarray, "h w 3"], size: int, filter: str = "box"
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes to a square with an antialiased filter; returns an image of that size unchanged.

    Args:
      image: pixels; the aspect ratio is not kept, see `center_crop_resize`.
      size: side of the result, pixels.
      filter: a row of RESIZE_FILTERS.
    """
    if image.shape[:2] == (size, size):
        return image
    return resize_box(image, (size, size), filter)


def center_crop_resize(
    image: UInt8[np.ndarray, "h w 3"], size: int, filter: str = "box"
) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts the largest centred square and resizes it to `size` pixels (see `resize_host`)."""
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_host(image[top : top + side, left : left + side], size, filter)


def upsample(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """Upsamples images bilinearly on the device, for the conditioning of an SR stage.

    Args:
      images: in [-1, 1].
      size: side of the result, pixels; at least h.
    """
    return jax.image.resize(images, (images.shape[0], size, size, 3), "bilinear")


def grid(
    images: UInt8[np.ndarray, "n h w 3"],
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
) -> UInt8[np.ndarray, "rows cols 3"]:
    """Arranges images in a grid, row by row, each with its caption underneath.

    Args:
      images: images of one size.
      columns: images per row.
      captions: one per image, wrapped to the width of the image; None: no text.
      scale: integer factor of nearest-neighbour upsampling.
    """
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    gap, font = 4, ImageFont.load_default(size=12)
    wrapped = [_wrap(caption, width, font) for caption in captions or [""] * count]
    lines = max((text.count("\n") + 1 for text in wrapped if text), default=0)
    cell_height, cell_width = height + 15 * lines + gap, width + gap
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(Image.fromarray(image), (left, top))
        draw.multiline_text((left, top + height), text, fill="black", font=font, spacing=1)
    return np.asarray(sheet)


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    per_letter = font.getlength("abcdefghijklmnopqrstuvwxyz") / 26
    return "\n".join(textwrap.wrap(caption, max(4, int(width / per_letter))))


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes an image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def save_png(
    path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"], text: Mapping[str, str]
) -> None:
    """Writes a PNG file with text chunks, atomically.

    Args:
      path: the file; missing parent folders are created.
      image: pixels.
      text: keyword -> value, any Unicode.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_itxt(keyword, value)
    with atomic.file(path, durable=False) as temporary:
        Image.fromarray(image).save(temporary, format="png", pnginfo=chunks)
