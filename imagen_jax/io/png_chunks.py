"""PNG files without the chunks that no pixel needs, so that none of them rejects intact pixels.

Pillow refuses a file with a large or damaged text chunk or colour profile. The pixels need neither;
the profile is returned beside them, or one made of the chunks that state colours in numbers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from imagen_jax.io import icc

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 8 << 20  # Profiles of printers have up to some megabytes.
MAX_XMP_BYTES = 1 << 20
_COLOURS = {b"cICP", b"sRGB", b"gAMA", b"cHRM"}
# A gAMA within 5% of 1/2.2 stands for sRGB's curve, as in libpng.
_SIMILAR, _LARGEST = 0.05, 100.0
# Of pixels, transparency and animation. A file with a damaged one of these is damaged.
_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT"}


def without_ancillary(data: bytes) -> tuple[bytes, bytes | None]:
    """Removes all chunks but those of pixels, EXIF and XMP (which may hold the orientation).

    Args:
      data: an image file; any other format than PNG is returned as it is.

    Returns:
      The file, and its colour profile; b"": it is too large or damaged; None: there is none, and no
      chunk that states other colours than sRGB's.

    Raises:
      icc.UnsupportedTransferError: pixels of high dynamic range.
    """
    if not data.startswith(SIGNATURE):
        return data, None
    kept, profile, colours, dropped = [SIGNATURE], None, {}, False
    for kind, content, whole in _chunks(data):
        if kind == b"iCCP":
            profile = _profile(content)
        if kind in _COLOURS and _is_intact(whole):
            colours.setdefault(kind, content)
        if kind in _PIXELS or (
            kind in (b"eXIf", b"iTXt") and _is_orientation(kind, content, whole)
        ):
            kept.append(whole)
        else:
            dropped = True
    grey = data[25:26] in (b"\0", b"\4")  # The colour type of IHDR.
    return (b"".join(kept) if dropped else data), _colour(colours, profile, grey)


def _colour(colours: dict[bytes, bytes], profile: bytes | None, grey: bool) -> bytes | None:
    """The profile by the precedence of PNG, third edition: cICP, iCCP, sRGB, gAMA with cHRM."""
    code_points = colours.get(b"cICP", b"")
    if len(code_points) == 4 and code_points[2:] == b"\0\1":  # RGB of full range.
        return icc.of_code_points(code_points[0], code_points[1], grey)
    if profile is not None or b"sRGB" in colours:
        return profile
    gamma, chromaticities = colours.get(b"gAMA", b""), colours.get(b"cHRM", b"")
    exponent, corners = 0.0, icc.BT709
    if len(gamma) == 4 and (value := struct.unpack(">I", gamma)[0]):
        exponent = 100_000 / value
        if abs(exponent / 2.2 - 1) < _SIMILAR:
            exponent = 0.0
    if len(chromaticities) == 32:
        corners = tuple(n / 100_000 for n in struct.unpack(">8I", chromaticities))
    if not exponent and corners == icc.BT709:
        return None
    return icc.profile(corners, exponent, grey) if exponent < _LARGEST else b""


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(kind, content, whole chunk) up to IEND; what follows a damaged header is one chunk."""
    at = len(SIGNATURE)
    while at < len(data):
        header = data[at : at + 8]
        length = struct.unpack(">I", header[:4])[0] if len(header) == 8 else len(data)
        end = at + 12 + length
        if end > len(data) or not header[4:].isalpha():
            yield b"IDAT", b"", data[at:]
            return
        yield header[4:], data[at + 8 : end - 4], data[at:end]
        if header[4:] == b"IEND":
            return
        at = end


def _is_orientation(kind: bytes, content: bytes, whole: bytes) -> bool:
    """Whether this is an undamaged chunk of EXIF or uncompressed XMP."""
    if not _is_intact(whole):
        return False
    xmp = content.startswith(b"XML:com.adobe.xmp\0\0") and len(content) <= MAX_XMP_BYTES
    return kind == b"eXIf" or xmp


def _is_intact(whole: bytes) -> bool:
    return zlib.crc32(whole[4:-4]) == struct.unpack(">I", whole[-4:])[0]


def _profile(content: bytes) -> bytes:
    """The profile of an iCCP chunk: name, 0, method 0, deflated bytes; b"" if it cannot be read."""
    name, zero, rest = content.partition(b"\0")
    if not name or not zero or rest[:1] != b"\0":
        return b""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return b"" if inflate.unconsumed_tail else profile
