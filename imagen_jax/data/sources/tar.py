"""The files in a tar file by their headers; the contents are not read.

Headers of plain files and folders, as every program writes them, are read here, several times
faster than by `tarfile`. Any other header (long names, PAX, links, damage) makes `tarfile` read the
whole list, and judge it.
"""

from __future__ import annotations

import os
import pathlib
import re
import tarfile
import zlib
from typing import Any, BinaryIO, NamedTuple, cast

MAX_HEADER_BYTES = 1 << 20
_BLOCK = 512
_OCTAL = re.compile(rb"[ \0]*([0-7]{1,12})[ \0]*")
_ZEROS = bytes(_BLOCK)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
      name: as in its header.
      offset: of its content, bytes.
      size: bytes.
      is_file: False for links and devices.
    """

    name: str
    offset: int
    size: int
    is_file: bool = True


def members(path: pathlib.Path) -> tuple[list[Member], str]:
    """All members but folders before the first damage, and what that is; "": there is none."""
    try:
        found = _plain_members(path)
        if found is None and (packed := _compression(path)):
            return [], f"compressed ({packed}; unpack it first: samples are read at their offsets)"
    except OSError:
        found = None
    return _all_members(path) if found is None else found


def _compression(path: pathlib.Path) -> str:
    """The program that packed a file, by its first bytes; "": none that is known."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((name for mark, name in _PACKED.items() if start.startswith(mark)), "")


def _after_end(file: BinaryIO, at: int) -> str:
    """What follows the end of a tar file, such as a second one; "": zeros."""
    file.seek(at)
    rest = file.read(MAX_HEADER_BYTES)
    if not rest.strip(b"\0"):
        return ""
    size = os.fstat(file.fileno()).st_size - at
    return f"data after its end ({size:,} bytes are not read; tar files cannot be concatenated)"


def _plain_members(path: pathlib.Path) -> tuple[list[Member], str] | None:
    """The members of an undamaged file of plain headers; None: it is another."""
    found, at = [], 0
    with path.open("rb", buffering=1 << 16) as file:
        end = os.fstat(file.fileno()).st_size
        while True:
            file.seek(at)
            header = file.read(_BLOCK)
            if header == _ZEROS:
                return found, _after_end(file, at)
            member = _plain_member(header, at) if len(header) == _BLOCK else None
            if member is None or member.offset + member.size > end:
                return None
            if member.is_file:
                found.append(member)
            at = member.offset + -(-member.size // _BLOCK) * _BLOCK


def _plain_member(header: bytes, at: int) -> Member | None:
    """A plain file, or a folder (`is_file` is False); None: anything else."""
    kind, size = header[156:157], _OCTAL.fullmatch(header, 124, 136)
    checksum = _OCTAL.fullmatch(header, 148, 156)
    if kind not in (b"0", b"\0", b"5") or not size or not checksum or header[257:262] != b"ustar":
        return None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521.
    found = zlib.adler32(b"        ", zlib.adler32(header[:148])) & 0xFFFF
    found = zlib.adler32(header[156:], found) & 0xFFFF
    if (int(checksum[1], 8) + 1) % 65521 != found:
        return None
    name = header[:100].split(b"\0", 1)[0]
    if header[345]:
        if header[257:263] != b"ustar\0":  # GNU's headers have other fields there.
            return None
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    bytes_ = int(size[1], 8)
    if kind == b"5":
        return Member("", at + _BLOCK, 0, False) if bytes_ == 0 else None
    if not name or name.endswith(b"/"):
        return None
    return Member(name.decode("utf-8", "surrogateescape"), at + _BLOCK, bytes_)


def _all_members(path: pathlib.Path) -> tuple[list[Member], str]:
    """See `members`; by `tarfile`."""
    found: list[Member] = []
    try:
        with (
            path.open("rb") as file,
            tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as shard,
        ):
            at, end = -1, os.fstat(file.fileno()).st_size
            for member in shard:
                if member.offset <= at or member.size < 0:
                    raise tarfile.ReadError("headers that lead back")
                at = member.offset
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isdir():
                    place = (member.offset_data, member.size)
                    found.append(Member(member.name, *place, member.isfile()))
            return found, _after_end(file, min(shard.offset, end))
    # tarfile raises ValueError for numbers and names that it cannot read.
    except (tarfile.TarError, OSError, ValueError) as error:
        return found, f"truncated (the first {len(found)} files are used: {error})"


class _Headers:
    """A tar file for reading headers: `tarfile` reads a long name or a PAX header as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Reads `size` bytes. Raises ReadError: no header has so many."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)
