"""ICC profiles of colour spaces that files state in numbers: chromaticities, transfer functions.

PNG has gAMA, cHRM and cICP chunks, AVIF and HEIC an `nclx` box (isobmff.py). cICP and `nclx` hold
code points of ITU-T H.273. The profile goes the way of a profile in the file (colour.py).
"""

from __future__ import annotations

import functools
import struct

import numpy as np

Chromaticities = tuple[float, ...]  # x and y of white, red, green and blue.

_D65, _D50 = (0.3127, 0.3290), (0.3457, 0.3585)
BT709: Chromaticities = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# Table 2 of H.273; 2: unspecified.
PRIMARIES: dict[int, Chromaticities] = {
    1: BT709,
    2: BT709,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
# Table 3 of H.273: exponents; 0: the curve of sRGB, which browsers use for BT.709's, too.
TRANSFERS = {1: 0.0, 2: 0.0, 4: 2.2, 5: 2.8, 6: 0.0, 8: 1.0, 13: 0.0, 14: 0.0, 15: 0.0}
_HDR = {16: "PQ", 18: "HLG"}
# Bradford: adapts XYZ from one white to another.
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


class UnsupportedTransferError(ValueError):
    """The pixels are of high dynamic range; 8 bits of sRGB do not hold them."""


def of_code_points(primaries: int, transfer: int, grey: bool = False) -> bytes | None:
    """The profile of code points of H.273.

    Args:
      primaries: row of PRIMARIES.
      transfer: row of TRANSFERS.
      grey: whether the pixels have one channel.

    Returns:
      The profile; None: it is sRGB's; b"": unknown code points.

    Raises:
      UnsupportedTransferError: PQ or HLG.
    """
    if transfer in _HDR:
        raise UnsupportedTransferError(f"high dynamic range, {_HDR[transfer]}; convert it to sRGB")
    if primaries not in PRIMARIES or transfer not in TRANSFERS:
        return b""
    return profile(PRIMARIES[primaries], TRANSFERS[transfer], grey)


@functools.lru_cache(maxsize=32)
def profile(chromaticities: Chromaticities, exponent: float, grey: bool = False) -> bytes | None:
    """The profile of chromaticities and an exponent.

    Args:
      chromaticities: x and y of white, red, green and blue.
      exponent: of stored values to light; 0: the curve of sRGB.
      grey: whether the pixels have one channel; the chromaticities are then of no effect.

    Returns:
      The profile; None: it is sRGB's; b"": the chromaticities span no colours.
    """
    if exponent == 0 and (grey or np.allclose(chromaticities, BT709, rtol=0, atol=0.002)):
        return None
    if grey:
        return _file(b"GRAY", {b"kTRC": _curve(exponent)})
    try:
        columns = _columns(chromaticities)
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return b""
    if not (np.abs(columns) < 8).all():
        return b""
    tags = {name: _xyz(column) for name, column in zip(_COLUMNS, columns.T, strict=True)}
    return _file(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(exponent)))


_COLUMNS = (b"rXYZ", b"gXYZ", b"bXYZ")


def _columns(chromaticities: Chromaticities) -> np.ndarray:
    """XYZ of red, green and blue in columns, adapted to D50 (SMPTE RP 177; Bradford)."""
    white, *primaries = (
        np.array([x / y, 1, (1 - x - y) / y])
        for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)
    )
    matrix = np.stack(primaries, 1)
    matrix = matrix * np.linalg.solve(matrix, white)
    x, y = _D50
    cones = _BRADFORD @ np.array([x / y, 1, (1 - x - y) / y]) / (_BRADFORD @ white)
    return np.linalg.solve(_BRADFORD, cones[:, None] * (_BRADFORD @ matrix))


def _file(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A display profile of version 4."""
    tags = {b"wtpt": _xyz(np.array([0.9642, 1.0, 0.8249])), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    header = bytearray(128)
    header[:4] = struct.pack(">I", start + len(body))
    header[8:12], header[12:16], header[16:20] = b"\x04\x20\0\0", b"mntr", space
    header[20:24], header[36:40] = b"XYZ ", b"acsp"
    header[68:80] = _xyz(np.array([0.9642, 1.0, 0.8249]))[8:]
    return bytes(header) + table + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def _curve(exponent: float) -> bytes:
    """A parametric curve: of sRGB (five numbers), or an exponent."""
    numbers = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045] if exponent == 0 else [exponent]
    head = struct.pack(">4sIHH", b"para", 0, 3 if exponent == 0 else 0, 0)
    return head + struct.pack(f">{len(numbers)}i", *(round(n * 65536) for n in numbers))
