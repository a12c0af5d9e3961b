"""Images as arrays: bytes -> uint8 -> [-1, 1] and back, resizing, crops, grids, PNG files.

Files of other people are hostile input: only the decoders of FORMATS are started (Pillow's others
start Ghostscript), the pixels being decoded share one budget, and all errors are `ImageError`.

Used by the data pipeline (decoding, cropping and resizing on the host), the cascade (`upsample` on
the device, `to_uint8` at its end) and the reports (`grid`, `save_png`).

Paper is silent: resize filters. Host resizing is antialiased.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from imagen_jax.io import atomic, colour, fonts, icc, isobmff, png_chunks, rendering
from imagen_jax.io.pixel_budget import BUDGET
from imagen_jax.io.rendering import WHITE, Colour

AnyArray = TypeVar("AnyArray", Array, np.ndarray)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the latter two exclusive
# A JPEG file and a rectangle -> the pixels; raises ImageError if it cannot decode the file.
DecodeJpegBox = Callable[[bytes, Box], np.ndarray]

# Larger images are mistakes or attacks; Pillow would only warn.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow's names. MPO, a JPEG followed by a second one, is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
# Scans of a JPEG. An encoder writes about ten; a file of hundreds takes minutes to decode.
MAX_SCANS = 100
# First bytes of files of FORMATS; two bytes, as of BMP, prove nothing.
_SIGNATURES = (png_chunks.SIGNATURE, b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")

_HEIF = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # Brands of HEIC files.

RESIZE_FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_CAPTION_LINES = 12  # Of a caption in a grid.
ENLARGING_FILTER = "bicubic"


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


def decode(data: bytes, background: Colour = WHITE) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of `decoded`, after whose use nothing counts them any more."""
    with decoded(data, background) as pixels:
        return pixels


@contextlib.contextmanager
def decoded(data: bytes, background: Colour = WHITE) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Decodes an image file to RGB as viewers show it; its pixels count until the context ends.

    Applies EXIF orientation, converts colours to sRGB by the file's ICC profile or its numbers,
    composites transparency over a colour, scales 16-bit grey to 8 bits, converts CMYK and palettes,
    and takes the first frame of an animation. The format is detected from the content.

    Args:
      data: an image file of one of FORMATS, or HEIC where pillow_heif is installed.
      background: sRGB colour under transparent pixels.

    Raises:
      ImageError: empty, damaged or truncated data, not an image, or more than MAX_PIXELS.
    """
    with contextlib.ExitStack() as stack:
        with _opened(data) as (image, profile):
            stack.enter_context(BUDGET.hold(image.width * image.height))
            pixels = np.asarray(rendering.render(image, profile, background)[0])
        del image
        yield pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS, and HEIF where its plug-in is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return FORMATS
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*FORMATS, "HEIF")


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, bytes | None]]:
    """Opens an image and reads its header; all errors in the context become ImageError.

    Yields:
      The image, and its ICC profile; None: there is none.
    """
    if not data:
        raise ImageError("unreadable (empty)")
    try:
        data, profile = png_chunks.without_ancillary(data)
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"too large ({size} px, at most {MAX_PIXELS:,} in all)")
            if image.info.get("progressive") and data.count(b"\xff\xda") > MAX_SCANS:
                raise ImageError(f"wrong type (a JPEG of more than {MAX_SCANS} scans)")
            own = image.info.get("icc_profile") or isobmff.profile(data)
            yield image, own if profile is None else profile
    except ImageError:
        raise
    except (rendering.UnsupportedError, icc.UnsupportedTransferError) as error:
        raise ImageError(f"wrong type ({error})") from None
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF and "HEIF" not in _formats():
            raise ImageError("wrong type (HEIC; install pillow-heif)") from None
        known = data.startswith(_SIGNATURES) or data[8:12] in (b"WEBP", b"avif")
        reason = "unreadable (damaged header)" if known else "wrong type (not an image)"
        raise ImageError(reason) from None
    except Image.DecompressionBombError:
        raise ImageError(f"too large (at most {MAX_PIXELS:,} pixels in all)") from None
    # The parsers of Pillow's plug-ins raise many types, SyntaxError included.
    except Exception as error:
        raise ImageError(f"unreadable ({' '.join(str(error).split())[:200]})") from None


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
      mode: "decode" checks the whole file; "header" only the header, which misses later damage and
        has no note on the colour profile.

    Raises:
      ImageError: see `decode`.
    """
    with _opened(data) as (image, profile):
        orientation, colours = rendering.orientation(image), image.mode
        is_16_bit = colours.startswith("I") or any(
            ";16" in str(t.args) for t in getattr(image, "tile", ())
        )
        transparent, profile_note = image.has_transparency_data, ""
        # Pillow turns the size of a TIFF file itself.
        turned = orientation > 4 and image.format != "TIFF"
        size = (image.height, image.width) if turned else image.size
        if mode == "decode":
            with BUDGET.hold(image.width * image.height):
                shown, profile_note = rendering.render(image, profile)
            size = shown.size
            orientation = max(orientation, rendering.orientation(image))
        frames = _frames(image)
        notes = {
            "rotated by EXIF": orientation > 1,
            "converted from CMYK": colours == "CMYK",
            "converted from 16 bits": is_16_bit,
            f"first frame alone (of {frames})": frames > 1,
            "transparency over data.background": transparent,
            profile_note: profile_note,
        }
        found = tuple(note for note, applies in notes.items() if applies)
        return ImageInfo(size, image.format or "", found)


def _frames(image: Image.Image) -> int:
    """Number of frames; 1 for a JPEG that another follows, or where later frames are damaged."""
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # As in `_opened`.
        return 1


def decode_box(
    data: bytes,
    choose: Callable[[int, int], Box],
    decode_jpeg_box: DecodeJpegBox | None = None,
    background: Colour = WHITE,
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a rectangle of an image; equals that part of `decode`.

    Args:
      data: an image file.
      choose: width and height in pixels -> the rectangle.
      decode_jpeg_box: decodes only a rectangle of a JPEG, to the same pixels; None: decodes the
        whole image. It is not used for a JPEG with a colour profile.
      background: see `decode`.

    Raises:
      ImageError: see `decode`.
    """
    if decode_jpeg_box is not None:
        with _opened(data) as (image, profile):
            plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            plain = plain and rendering.orientation(image) == 1
            plain = plain and colour.is_plain(profile, image.mode)
            width, height = image.size
            whole = bool(image.info.get("progressive"))
        if plain:
            left, top, right, bottom = choose(width, height)
            # Chroma is interpolated between neighbours: one more pixel on each side.
            outer = (max(left - 1, 0), max(top - 1, 0), min(right + 1, width))
            outer = (*outer, min(bottom + 1, height))
            area = (outer[2] - outer[0]) * (outer[3] - outer[1])
            held = BUDGET.hold(width * height if whole else area)
            with contextlib.suppress(ImageError), held:
                pixels = decode_jpeg_box(data, outer)
                y, x = top - outer[1], left - outer[0]
                return pixels[y : y + bottom - top, x : x + right - left]
    pixels = decode(data, background)
    left, top, right, bottom = choose(pixels.shape[1], pixels.shape[0])
    return pixels[top:bottom, left:right]


def resize_box(
    image: UInt8[np.ndarray, "h w 3"],
    size: tuple[int, int],
    filter: str,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes a rectangle of an image with an antialiased filter.

    The box filter enlarges like the nearest neighbour; an axis that grows gets ENLARGING_FILTER in
    its place.

    Args:
      image: pixels; the filter also reads pixels around the rectangle.
      size: width and height of the result, pixels.
      filter: a row of RESIZE_FILTERS.
      box: left, top, right, bottom in pixels, fractions allowed; None: the whole image.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    filters = [
        filter_for(filter, reduction)
        for reduction in ((right - left) / size[0], (bottom - top) / size[1])
    ]
    pixels = Image.fromarray(image)
    if filters[0] == filters[1]:
        return np.asarray(pixels.resize(size, RESIZE_FILTERS[filters[0]], box=box))
    # One axis grows, the other one shrinks.
    across = (left, 0.0, right, float(height))
    pixels = pixels.resize((size[0], height), RESIZE_FILTERS[filters[0]], box=across)
    down = (0.0, top, float(size[0]), bottom)
    return np.asarray(pixels.resize(size, RESIZE_FILTERS[filters[1]], box=down))


def filter_for(filter: str, reduction: float) -> str:
    """The filter of an axis: ENLARGING_FILTER where the box filter would repeat pixels.

    Args:
      filter: a row of RESIZE_FILTERS.
      reduction: pixels of the source per pixel of the result; below 1 the axis grows.
    """
    return ENLARGING_FILTER if filter == "box" and reduction < 1 else filter


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
    gap, font = 4, fonts.label_font(12)
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
    letters, limit = max(4, int(width / per_letter)), MAX_CAPTION_LINES
    return "\n".join(textwrap.wrap(caption, letters, max_lines=limit, placeholder="..."))


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
