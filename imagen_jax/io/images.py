"""Pictures as arrays: bytes -> uint8 -> [-1, 1] and back, resizing, crops, grids, PNG files.

Everything that reads or writes a picture goes through here: the data pipeline (decode, crop,
resize on the host), the cascade (`upsample` in the graph, `to_uint8` at its end) and the reports
(`grid`, `save_png`). The paper is silent about filters; host resizing is antialiased.
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
# A JPEG's bytes and a rectangle -> its pixels; ImageError where that cannot be done.
DecodeJpegBox = Callable[[bytes, Box], np.ndarray]

# Larger pictures are mistakes or attacks. Pillow would only warn of them.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

RESIZE_FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(ValueError):
    """Bytes that are not a usable picture; the message says why in a few words."""


def to_float(image: UInt8[AnyArray, "*b 3"]) -> Float[AnyArray, "*b 3"]:
    """Maps uint8 0..255 to float32 [-1, 1], NumPy in NumPy out, JAX in JAX out.

    The numerator 2x - 255 is exact and the product is the only rounding, so that NumPy, XLA and
    TensorFlow give the same bits whatever they fuse.

    Args:
      image: pixels, any leading shape.

    Returns:
      float32 of the same shape, (2x - 255) / 255.
    """
    xp: Any = jnp if isinstance(image, jax.Array) else np
    return (image.astype(xp.int32) * 2 - 255).astype(xp.float32) * xp.float32(1 / 255)


def to_uint8(image: Float[AnyArray, "*b 3"]) -> UInt8[AnyArray, "*b 3"]:
    """Inverse of `to_float`: rounds to the nearest of 0..255; values beyond [-1, 1] are clipped."""
    xp: Any = jnp if isinstance(image, jax.Array) else np
    return xp.clip(xp.round((image + 1.0) * 127.5), 0.0, 255.0).astype(xp.uint8)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a picture file to RGB as a viewer shows it.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits,
    CMYK and palettes are converted, and of an animation the first frame is taken. The name of the
    file does not matter.

    Raises:
      ImageError: empty, damaged or truncated data, data that is no picture, or one of more than
        MAX_PIXELS.
    """
    with _opened(data) as picture:
        picture.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture with its header read; whatever goes wrong inside becomes a ImageError."""
    if not data:
        raise ImageError("unreadable (empty)")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise ImageError(f"too large ({size} px, at most {MAX_PIXELS:,} in all)")
            yield picture
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("wrong type (not a picture)") from None
    except Image.DecompressionBombError:
        raise ImageError(f"too large (at most {MAX_PIXELS:,} pixels in all)") from None
    # Pillow's format plug-ins raise whatever their parsers stumble over (SyntaxError included).
    except Exception as error:
        raise ImageError(f"unreadable ({error})") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise ImageError("wrong type (more than 16 bits per channel)")
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ImageError("wrong type (floating-point pixels)")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


class Look(NamedTuple):
    """What a look at a picture file tells.

    Attributes:
      size: width and height as shown, pixels.
      format: Pillow's name of it, such as JPEG.
      notes: what `decode` had to do to make plain RGB of it.
    """

    size: tuple[int, int]
    format: str
    notes: tuple[str, ...]


def look(data: bytes, through: str) -> Look:
    """Examines a picture file: all of it ("decode"), or its header alone ("header").

    Raises:
      ImageError: it cannot be used; the header alone does not tell damage further in.
    """
    with _opened(data) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        sixteen = picture.mode.startswith("I") or any(
            ";16" in str(t.args) for t in getattr(picture, "tile", ())
        )
        # MPO is what phones call a JPEG with a second one behind it.
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        notes = {
            "turned by EXIF": turned,
            "converted from CMYK": picture.mode == "CMYK",
            "converted from 16 bits": sixteen,
            f"first frame alone (of {frames})": frames > 1,
            "transparency over white": picture.has_transparency_data,
        }
        size = picture.size
        if turned and picture.getexif()[ExifTags.Base.Orientation] > 4:
            size = (picture.height, picture.width)
        if through == "decode":
            picture.load()
            size = _to_rgb(ImageOps.exif_transpose(picture)).size
        found = tuple(remark for remark, holds in notes.items() if holds)
        return Look(size, picture.format or "", found)


def decode_box(
    data: bytes, choose: Callable[[int, int], Box], decode_jpeg_box: DecodeJpegBox | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a rectangle of a picture: the pixels `decode` gives there.

    Args:
      data: a picture file.
      choose: width and height in pixels -> the rectangle.
      decode_jpeg_box: decodes a rectangle of a JPEG without the rest, if there is such a thing;
        None: all is decoded and the rectangle cut out. The pixels are the same.

    Raises:
      ImageError: see `decode`.
    """
    if decode_jpeg_box is not None:
        with _opened(data) as picture:
            plain = picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB")
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
            width, height = picture.size
        if plain and not turned:
            left, top, right, bottom = choose(width, height)
            # Colour is interpolated between neighbours: the rim of a rectangle needs one more.
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
    """Resizes a rectangle of a picture with an antialiased filter.

    Args:
      image: pixels; those around the rectangle count where the filter reaches them.
      size: width and height of the result, pixels.
      filter: a row of RESIZE_FILTERS.
      box: left, top, right, bottom in pixels, fractions allowed; None: the whole picture.
    """
    return np.asarray(Image.fromarray(image).resize(size, RESIZE_FILTERS[filter], box=box))


def resize_host(
    image: UInt8[np.ndarray, "h w 3"], size: int, filter: str = "box"
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes to a square with an antialiased filter; a picture of that size passes unchanged.

    Args:
      image: pixels; a picture that is not square is squeezed, see `center_crop_resize`.
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
    """Enlarges pictures bilinearly in the graph: the low-resolution conditioning of an SR stage.

    Args:
      images: pictures in [-1, 1].
      size: side of the result, pixels; at least h.
    """
    return jax.image.resize(images, (images.shape[0], size, size, 3), "bilinear")


def grid(
    images: UInt8[np.ndarray, "n h w 3"],
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
) -> UInt8[np.ndarray, "rows cols 3"]:
    """One picture of many, row by row, each with its caption underneath.

    Args:
      images: pictures of one size.
      columns: pictures per row.
      captions: one per picture, wrapped to the picture's width; None: no text.
      scale: whole-number enlargement without smoothing, so that small pictures can be looked at.
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
    """The picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def save_png(
    path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"], text: Mapping[str, str]
) -> None:
    """Writes a PNG with text chunks; a reader never sees a half-written file.

    Args:
      path: the file; its folder is made if it is missing.
      image: pixels.
      text: keyword -> value, any Unicode.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_itxt(keyword, value)
    with atomic.file(path, durable=False) as temporary:
        Image.fromarray(image).save(temporary, format="png", pnginfo=chunks)
