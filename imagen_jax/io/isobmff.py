"""The colour space that an AVIF or HEIC file states in numbers, its `nclx` box (ISO/IEC 23008-12).

Pillow converts the pixels to RGB by the file's matrix, but neither applies nor returns primaries
and transfer function.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imagen_jax.io import icc

_MOST_BOXES = 4096


def profile(data: bytes) -> bytes | None:
    """The profile of `code_points`; see `icc.of_code_points`."""
    numbers = code_points(data)
    return icc.of_code_points(*numbers) if numbers else None


def code_points(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer function of the primary image, code points of H.273.

    Args:
      data: an image file.

    Returns:
      None: it is no AVIF or HEIC, is damaged, has an ICC profile, or states no numbers.
    """
    if data[4:8] != b"ftyp":
        return None
    try:
        meta = _child(data, b"meta")[4:]
        primary = int.from_bytes(_child(meta, b"pitm")[4:], "big")
        properties = list(_boxes(_child(_child(meta, b"iprp"), b"ipco")))
        found = [
            properties[i - 1][1]
            for i in _indices(_child(_child(meta, b"iprp"), b"ipma"), primary)
            if 0 < i <= len(properties) and properties[i - 1][0] == b"colr"
        ]
    except (LookupError, struct.error):
        return None
    if any(box[:4] in (b"prof", b"rICC") for box in found):
        return None
    numbers = [struct.unpack(">HH", box[4:8]) for box in found if _is_nclx(box)]
    return numbers[0] if numbers else None


def _is_nclx(box: bytes) -> bool:
    return box[:4] == b"nclx" and len(box) >= 8


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the boxes of a box or file."""
    at = 0
    for _ in range(_MOST_BOXES):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        head = 8
        if size == 1:
            (size,), head = struct.unpack(">Q", data[at + 8 : at + 16]), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        yield kind, data[at + head : end]
        at = end


def _child(data: bytes, kind: bytes) -> bytes:
    """The first box of a kind. Raises LookupError."""
    for name, content in _boxes(data):
        if name == kind:
            return content
    raise LookupError(kind)


def _indices(box: bytes, item: int) -> list[int]:
    """Indices of an item's properties, from 1, by an `ipma` box."""
    wide, large = box[0] > 0, box[3] & 1
    (count,), at = struct.unpack(">I", box[4:8]), 8
    for _ in range(min(count, _MOST_BOXES)):
        number = int.from_bytes(box[at : at + (4 if wide else 2)], "big")
        at += 4 if wide else 2
        entries, size = box[at], 2 if large else 1
        at += 1
        if number == item:
            raw = [int.from_bytes(box[at + k * size :][:size], "big") for k in range(entries)]
            return [value & (0x7FFF if large else 0x7F) for value in raw]
        at += entries * size
    return []
