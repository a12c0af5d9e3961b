"""Colours as a viewer shows them: ICC profiles in every format against lcms, within 2 of 255."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from imagen_jax.io import images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}
GAMMA = {"linear": 1.0, "p3": None, "adobe": 2.2, "gamma18": 1.8}


def rgb_profile(primaries: dict[bytes, tuple] | None = None, gamma: float | None = None) -> bytes:
    """sRGB's profile by lcms with other primaries or another gamma."""
    raw = bytearray(SRGB)
    for k in range(struct.unpack(">I", raw[128:132])[0]):
        at = 132 + 12 * k
        sig, offset, _ = struct.unpack(">4sII", raw[at : at + 12])
        if primaries and sig in primaries:
            fixed = [round(v * 65536) for v in primaries[sig]]
            raw[offset + 8 : offset + 20] = struct.pack(">3i", *fixed)
        if gamma and sig in (b"rTRC", b"gTRC", b"bTRC"):
            # One entry is a gamma in u8Fixed8.
            curve = b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
            raw[offset : offset + 16] = curve
            raw[at + 8 : at + 12] = struct.pack(">I", 14)
    return bytes(raw)


def grey_profile(gamma: float) -> bytes:
    """A grey profile with one gamma, written by hand."""
    curve = b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ " + b"\0" * 4 + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"wtpt", white), (b"kTRC", curve)]
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for sig, content in tags:
        table += struct.pack(">4sII", sig, at + len(body), len(content))
        body += content
    header = bytearray(128)
    header[8:12], header[12:16] = b"\x02\x40\0\0", b"mntr"
    header[16:20], header[20:24], header[36:40] = b"GRAY", b"XYZ ", b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    whole = header + table + body
    whole[:4] = struct.pack(">I", len(whole))
    return bytes(whole)


PROFILES = {
    "linear": rgb_profile(gamma=1.0),
    "gamma18": rgb_profile(gamma=1.8),
    "p3": rgb_profile(P3),
    "adobe": rgb_profile(ADOBE, 2.2),
    "p3_linear": rgb_profile(P3, 1.0),
}


def colours(mode: str = "RGB") -> Image.Image:
    """A smooth image of many colours."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((64, 48), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(data: bytes, mode: str = "RGB") -> np.ndarray:
    """The file as lcms shows it."""
    with Image.open(io.BytesIO(data)) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        target = ImageCms.createProfile("sRGB")
        pixels = image.convert(mode)
        return np.asarray(ImageCms.profileToProfile(pixels, profile, target, outputMode="RGB"))


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "jpeg": {"quality": 95}}
LOSSLESS["avif"] = {"quality": 90}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("name", PROFILES)
def test_rgb_profiles(name, kind):
    data = encode(colours(), kind, icc_profile=PROFILES[name], **LOSSLESS[kind])
    decoded = images.decode(data)
    assert levels_apart(decoded, reference(data)) <= 2
    with Image.open(io.BytesIO(data)) as image:
        assert levels_apart(decoded, np.asarray(image.convert("RGB"))) > 10
    notes = images.inspect_image(data, "decode").notes
    assert notes == ("colour profile converted to sRGB",)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_grey_profiles(gamma, kind):
    data = encode(colours("L"), kind, icc_profile=grey_profile(gamma), **LOSSLESS[kind])
    decoded = images.decode(data)
    assert levels_apart(decoded, reference(data, "L")) <= 2
    with Image.open(io.BytesIO(data)) as image:
        assert levels_apart(decoded, np.asarray(image.convert("RGB"))) > 10


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA"])
def test_palettes_and_transparency_are_converted_before_they_are_composited(mode):
    profile = grey_profile(1.0) if mode == "LA" else PROFILES["p3_linear"]
    image = colours(mode)
    if mode != "P":
        image.putalpha(Image.new("L", image.size, 128))
    data = encode(image, "png", icc_profile=profile)
    opaque = reference(data, "L" if mode == "LA" else "RGB").astype(float)
    expected = (
        opaque if mode == "P" else 128 / 255 * opaque + (1 - 128 / 255) * np.array([0, 0, 255])
    )
    found = images.decode(data, background=(0, 0, 255))
    assert np.abs(found - expected).max() <= 2


def test_sixteen_bits_with_a_profile():
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    data = encode(Image.fromarray(levels), "png", icc_profile=grey_profile(1.0))
    eight = Image.fromarray((levels // 257).astype(np.uint8))
    expected = reference(encode(eight, "png", icc_profile=grey_profile(1.0)), "L")
    assert levels_apart(images.decode(data), expected) <= 2


def test_a_profile_that_changes_nothing_leaves_every_bit():
    for kind in ("png", "jpeg", "webp"):
        with_profile = encode(colours(), kind, icc_profile=SRGB, **LOSSLESS[kind])
        without = encode(colours(), kind, **LOSSLESS[kind])
        np.testing.assert_array_equal(images.decode(with_profile), images.decode(without))
        assert images.inspect_image(with_profile, "decode").notes == ()


BROKEN = {
    "garbage": b"this is no profile",
    "empty": b"\0" * 200,
    "cut": PROFILES["p3"][:150],
    "of other pixels": grey_profile(1.8),
    "too large": PROFILES["p3"] + b"\0" * (9 << 20),
}


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpeg"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_unusable_profile_is_ignored_and_noted(name, kind):
    if kind == "jpeg" and name == "too large":
        pytest.skip("a JPEG holds 255 segments of 64 kB; Pillow writes no more")
    data = encode(colours(), kind, icc_profile=BROKEN[name], **LOSSLESS[kind])
    plain = images.decode(encode(colours(), kind, **LOSSLESS[kind]))
    np.testing.assert_array_equal(images.decode(data), plain)
    assert images.inspect_image(data, "decode").notes == ("colour profile ignored",)


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


MEGABYTES = zlib.compress(b"x" * (20 << 20))
CHUNKS = {
    "large text": chunk(b"tEXt", b"Comment\0" + b"x" * (2 << 20)),
    "deflated text": chunk(b"zTXt", b"Comment\0\0" + MEGABYTES),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + MEGABYTES),
    "seventy megabytes of text": chunk(b"zTXt", b"C\0\0" + zlib.compress(b"x" * 900_000)) * 80,
    "text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", 1),
    "unknown method": chunk(b"zTXt", b"Comment\0\7abc"),
    "profile of 2 MB": chunk(
        b"iCCP", b"icc\0\0" + zlib.compress(PROFILES["p3"] + b"\0" * (2 << 20))
    ),
    "profile that inflates to 20 MB": chunk(b"iCCP", b"icc\0\0" + MEGABYTES),
    "profile of an unknown method": chunk(b"iCCP", b"icc\0\7abc"),
    "damaged EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08", 1),
    "private chunk": chunk(b"prVt", b"x" * 100, 1),
    "short physical size": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", CHUNKS)
def test_no_chunk_beside_the_pixels_rejects_them(name, place):
    plain = encode(colours(), "png")
    header, end = 33, len(plain) - 12
    at = header if place == "before the pixels" else end
    data = plain[:at] + CHUNKS[name] + plain[at:]
    decoded = images.decode(data)
    info = images.inspect_image(data, "decode")
    if name == "profile of 2 MB":
        assert info.notes == ("colour profile converted to sRGB",)
        assert levels_apart(decoded, images.decode(plain)) > 20
    else:
        np.testing.assert_array_equal(decoded, images.decode(plain))
        assert info.notes == (("colour profile ignored",) if "profile" in name else ())


def test_pixels_that_are_not_intact_are_rejected_all_the_same():
    plain = encode(colours(), "png")
    at = plain.index(b"IDAT") + 30
    damaged = plain[:at] + bytes([plain[at] ^ 0xFF]) + plain[at + 1 :]
    for data in (damaged, plain[:-40], plain[:60], plain[:33], plain[:12]):
        with pytest.raises(images.ImageError, match="unreadable"):
            images.decode(data)


def test_the_orientation_survives_the_removal_of_chunks():
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 3000)
    tall = images.decode(encode(colours(), "png", exif=exif, pnginfo=info))
    assert tall.shape == (64, 48, 3)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    assert images.decode(encode(colours(), "png", pnginfo=info)).shape == (64, 48, 3)


@pytest.mark.parametrize("filter", images.RESIZE_FILTERS)
@pytest.mark.parametrize("size", [(61, 47), (128, 128), (17, 90), (90, 17)])
def test_enlarging_is_never_nearest(filter, size):
    """A smooth ramp stays smooth: no run of equal columns or rows where an axis grows."""
    ramp = np.linspace(0, 255, 32)
    image = np.stack([np.add.outer(ramp, ramp) / 2] * 3, -1).astype(np.uint8)
    large = images.resize_box(image, size, filter).astype(int)[..., 0]
    assert large.shape == size[::-1]
    for axis, length in ((1, size[0]), (0, size[1])):
        if length > 32:
            steps = np.diff(large, axis=axis)
            middle = steps.take(range(6, length - 6), axis)
            # A repeated pixel is a step of 0 beside one of 4.
            assert middle.max() <= 255 / 32 * 32 / length + 2
    np.testing.assert_array_equal(images.resize_box(image, (32, 32), filter), image)
