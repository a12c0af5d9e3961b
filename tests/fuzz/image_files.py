"""Valid image files of every format, with the metadata that readers of images parse."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin


def make_image(mode: str = "RGB", side: int = 40) -> Image.Image:
    """A small image of many colours."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def encode(kind: str, mode: str = "RGB", **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    make_image(mode).save(file, kind, **options)
    return file.getvalue()


def _png_of_numbers() -> bytes:
    """A PNG with the chunks that state its colours in numbers."""
    plain, chunks = encode("png"), b""
    corners = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    for body in (b"gAMA" + struct.pack(">I", 60_000), b"cHRM" + corners, b"cICP\x0c\x0d\0\1"):
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return plain[:33] + chunks + plain[33:]


def seeds() -> dict[str, list[bytes]]:
    """Valid files by format."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "hello" * 50, zip=True)
    frames = [make_image(), make_image().rotate(90)]
    animated = {"save_all": True, "append_images": frames[1:]}
    known = {"icc_profile": profile, "exif": exif}
    heif = {}
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        heif["heif"] = [encode("heif", **known), encode("heif", "RGBA")]
    return {
        "jpeg": [encode("jpeg", **known), encode("jpeg", "CMYK"), encode("jpeg", progressive=True)]
        + [encode("mpo", **animated)],
        "png": [encode("png", **known, pnginfo=text), encode("png", "P"), encode("png", "RGBA")]
        + [encode("png", **animated), _png_of_numbers()],
        "webp": [encode("webp", **known), encode("webp", "RGBA", lossless=True)]
        + [encode("webp", **animated)],
        "avif": [encode("avif", **known), encode("avif", "RGBA")],
        "tiff": [encode("tiff", **known), encode("tiff", compression="tiff_lzw")]
        + [encode("tiff", compression="tiff_adobe_deflate"), encode("tiff", "1")],
        "gif": [encode("gif"), encode("gif", **animated)],
        "bmp": [encode("bmp"), encode("bmp", "P")],
        **heif,
    }
