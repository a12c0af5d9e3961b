"""Colours that a file states in numbers (PNG chunks, AVIF and HEIC nclx) against the formulas."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.io import icc, images
from tests.io.test_colour import PROFILES, chunk, colours, encode, levels_apart, reference

# Linear RGB of Display P3 and BT.2020 to linear sRGB (CSS Color 4, sample code).
P3_TO_SRGB = [
    [1.2249402, -0.2249402, 0],
    [-0.0420570, 1.0420570, 0],
    [-0.0196376, -0.0786361, 1.0982736],
]
BT2020_TO_SRGB = [
    [1.6604910, -0.5876411, -0.0728499],
    [-0.1245505, 1.1328999, -0.0083494],
    [-0.0181508, -0.1005789, 1.1187297],
]


def srgb_to_light(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def light_to_srgb(x):
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def expected(pixels, exponent=0.0, matrix=None):
    """Pixels as sRGB, by the formulas."""
    x = pixels / 255
    light = x**exponent if exponent else srgb_to_light(x)
    if matrix is not None:
        light = light @ np.array(matrix).T
    return np.round(light_to_srgb(np.clip(light, 0, 1)) * 255)


def with_chunks(plain: bytes, *chunks: bytes) -> bytes:
    return plain[:33] + b"".join(chunks) + plain[33:]


def gamma(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", value))


def code_points(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, matrix, full]))


P3_CORNERS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_CORNERS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_CHUNK = chunk(b"cHRM", struct.pack(">8I", *P3_CORNERS))
SRGB_CHUNK = chunk(b"cHRM", struct.pack(">8I", *SRGB_CORNERS))
RENDERING = chunk(b"sRGB", b"\0")
PROFILE = chunk(b"iCCP", b"icc\0\0" + zlib.compress(PROFILES["linear"]))

CONVERTED = {
    "linear": ([gamma(100_000)], {"exponent": 1.0}),
    "gamma of 1.8": ([gamma(55_556), SRGB_CHUNK], {"exponent": 1.8}),
    "gamma of 4.4, as of consoles": ([gamma(22_727)], {"exponent": 4.4}),
    "P3 by cHRM": ([gamma(45_455), P3_CHUNK], {"matrix": P3_TO_SRGB}),
    "P3 by cHRM, linear": ([gamma(100_000), P3_CHUNK], {"exponent": 1.0, "matrix": P3_TO_SRGB}),
    "P3 by cICP": ([code_points(12, 13)], {"matrix": P3_TO_SRGB}),
    "BT.2020 by cICP": ([code_points(9, 1)], {"matrix": BT2020_TO_SRGB}),
    "linear by cICP": ([code_points(1, 8)], {"exponent": 1.0}),
    "cICP before sRGB": ([RENDERING, code_points(12, 13)], {"matrix": P3_TO_SRGB}),
    "cICP before a profile": ([PROFILE, code_points(12, 13)], {"matrix": P3_TO_SRGB}),
    "a profile before gAMA": ([gamma(22_727), PROFILE], {"exponent": 1.0}),
    "cICP of a narrow range, which no PNG has": (
        [PROFILE, code_points(12, 13, full=0)],
        {"exponent": 1.0},
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_png_chunks_that_change_colours(name):
    chunks, formula = CONVERTED[name]
    plain = encode(colours(), "png")
    data = with_chunks(plain, *chunks)
    pixels = np.asarray(colours())
    assert levels_apart(images.decode(data), expected(pixels, **formula)) <= 2
    assert levels_apart(images.decode(data), pixels) > 10
    assert images.inspect_image(data, "decode").notes == ("colour profile converted to sRGB",)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16"])
def test_gamma_of_every_kind_of_pixels(mode):
    image = colours("L" if mode in ("LA", "I;16") else mode)
    if mode == "LA":
        image.putalpha(255)
    shown = np.asarray(image.convert("RGB"))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = with_chunks(encode(image, "png"), gamma(100_000))
    assert levels_apart(images.decode(data), expected(shown, 1.0)) <= 2


UNCHANGED = {
    "gamma of 1/2.2": [gamma(45_455)],
    "gamma within five percent": [gamma(47_000)],
    "sRGB in numbers": [gamma(45_455), SRGB_CHUNK],
    "sRGB before gAMA": [gamma(100_000), P3_CHUNK, RENDERING],
    "gamma of zero": [gamma(0)],
    "gamma of three bytes": [chunk(b"gAMA", b"\0\1\0")],
    "gamma with a wrong checksum": [chunk(b"gAMA", struct.pack(">I", 100_000), 1)],
    "sRGB by cICP": [code_points(1, 13), gamma(100_000)],
    "BT.709 by cICP": [code_points(1, 1)],
    "unspecified cICP": [code_points(2, 2)],
    "short cICP": [chunk(b"cICP", b"\x0c\x0d")],
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_png_chunks_that_leave_every_bit(name):
    data = with_chunks(encode(colours(), "png"), *UNCHANGED[name])
    np.testing.assert_array_equal(images.decode(data), np.asarray(colours()))
    assert images.inspect_image(data, "decode").notes == ()


IGNORED = {
    "unknown code points": [code_points(77, 13)],
    "corners without an area": [chunk(b"cHRM", struct.pack(">8I", *[31270, 32900] * 4))],
    "corners on the axis": [chunk(b"cHRM", struct.pack(">8I", *[31270, 0] * 4))],
    "gamma beyond all displays": [gamma(1)],
}


@pytest.mark.parametrize("name", IGNORED)
def test_numbers_that_mean_no_colours_are_ignored_and_noted(name):
    data = with_chunks(encode(colours(), "png"), *IGNORED[name])
    np.testing.assert_array_equal(images.decode(data), np.asarray(colours()))
    assert images.inspect_image(data, "decode").notes == ("colour profile ignored",)


def avif(primaries: int, transfer: int, **options) -> bytes:
    """An AVIF file with other code points in its nclx box; the pixels stay as they are."""
    data = encode(colours(), "avif", quality=100, subsampling="4:4:4", **options)
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def heic(primaries: int, transfer: int) -> bytes:
    pytest.importorskip("pillow_heif").register_heif_opener()
    options = {"quality": 100, "chroma": 444, "save_nclx_profile": True}
    data = encode(colours(), "heif", color_primaries=1, transfer_characteristic=13, **options)
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


@pytest.mark.parametrize("make", [avif, heic])
def test_code_points_of_avif_and_heic(make):
    plain = images.decode(make(1, 13))
    for same in (make(1, 1), make(2, 2), make(1, 6)):
        np.testing.assert_array_equal(images.decode(same), plain)
    for points, formula in (
        ((12, 13), {"matrix": P3_TO_SRGB}),
        ((9, 14), {"matrix": BT2020_TO_SRGB}),
        ((1, 8), {"exponent": 1.0}),
    ):
        found = images.decode(make(*points))
        assert levels_apart(found, expected(plain, **formula)) <= 2
        assert levels_apart(found, plain) > 10
    if make is avif:  # libheif rejects unknown code points.
        np.testing.assert_array_equal(images.decode(make(77, 13)), plain)


def test_the_profile_of_an_avif_comes_before_its_code_points():
    data = encode(colours(), "avif", quality=100, icc_profile=PROFILES["p3"])
    assert levels_apart(images.decode(data), reference(data)) <= 2
    if b"colrnclx" in data:
        at = data.index(b"colrnclx") + 8
        data = data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :]
        assert levels_apart(images.decode(data), reference(data)) <= 2


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_rejected_with_the_reason(transfer, name):
    png = with_chunks(encode(colours(), "png"), code_points(9, transfer))
    for data in (png, avif(9, transfer), heic(9, transfer)):
        for check in ("header", "decode"):
            with pytest.raises(images.ImageError, match=f"high dynamic range, {name}"):
                images.inspect_image(data, check)


@pytest.mark.parametrize("primaries", icc.PRIMARIES)
def test_profiles_keep_white_and_grey(primaries):
    profile = icc.profile(icc.PRIMARIES[primaries], 1.0)
    grey = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)[None])
    data = encode(grey, "png", icc_profile=profile)
    assert levels_apart(images.decode(data), expected(np.asarray(grey), 1.0)) <= 2
