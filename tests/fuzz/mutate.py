"""Mutations of valid files: most leave the header intact, so that they reach the code behind it."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable

from imagen_jax.data.sources.tfrecord import masked_crc

BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TOKENS = (
    b"\0",
    b"\xff" * 4,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"\\ud800",
    b"../../x",
    b"{",
    b"[" * 5000,
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes at random places; one in three files has its first 64 bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not changed:
            break
        low = 0 if rng.random() < 1 / 3 else min(64, len(changed) - 1)
        at = rng.randrange(low, len(changed))
        rng.choice(CHANGES)(changed, at, rng)
    return bytes(changed)


def _flip(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.randrange(256)


def _number(data: bytearray, at: int, rng: random.Random) -> None:
    value, order = rng.choice(BOUNDARIES), rng.choice("<>")
    size = rng.choice((2, 4, 8))
    packed = struct.pack(f"{order}Q", value)
    data[at : at + size] = packed[:size] if order == "<" else packed[-size:]


def _remove(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 4, 100, 5000))]


def _repeat(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.choice((1, 8, 300))] * rng.choice((1, 2, 20))


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = rng.choice(TOKENS)


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    if rng.random() < 0.3:
        del data[at:]


def _copy(data: bytearray, at: int, rng: random.Random) -> None:
    start, size = rng.randrange(len(data)), rng.choice((4, 16, 200))
    data[at : at + size] = data[start : start + size]


CHANGES = (_flip, _flip, _set, _set, _number, _number, _remove, _repeat, _insert, _cut, _copy)


VALUES = (
    *(None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), "", "x" * 3000, "\ud800", "\0"),
    *("../../etc/passwd", "/etc/passwd", [], {}, [[]] * 9, {"a": {"b": None}}, "a,b", "~/x"),
)


def json_or_bytes(data: bytes, rng: random.Random) -> bytes:
    """In two of three cases, another value in a place of a JSON document or of JSON lines."""
    try:
        lines = [json.loads(data)]
    except ValueError:
        try:
            lines = [json.loads(line) for line in data.split(b"\n") if line]
        except ValueError:
            return mutate(data, rng)
    if rng.random() < 1 / 3:
        return mutate(data, rng)
    node = rng.choice(lines)
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            break
        place = rng.choice(places)
        if isinstance(node[place], dict | list) and rng.random() < 0.9:
            node = node[place]
            continue
        if rng.random() < 0.2:
            del node[place]
        else:
            node[place] = rng.choice(VALUES)
        break
    return "\n".join(map(json.dumps, lines)).encode()


def with_png_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their changed contents."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        end = at + 8 + struct.unpack(">I", fixed[at : at + 4])[0]
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def with_record_checksums(data: bytes) -> bytes:
    """A TFRecord file whose records have the checksums of their changed contents."""
    fixed, at = bytearray(data), 0
    while at + 16 <= len(fixed):
        fixed[at + 8 : at + 12] = struct.pack("<I", masked_crc(bytes(fixed[at : at + 8])))
        end = at + 12 + struct.unpack("<Q", fixed[at : at + 8])[0]
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack("<I", masked_crc(bytes(fixed[at + 12 : end])))
        at = end + 4
    return bytes(fixed)


def with_tar_checksums(data: bytes) -> bytes:
    """A tar file whose headers have the checksums of their changed contents."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % (sum(fixed[at : at + 512]) & 0o777777)
    return bytes(fixed)


def sometimes(repair: Callable[[bytes], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """`mutate`, followed by `repair` in two of three cases."""

    def both(data: bytes, rng: random.Random) -> bytes:
        changed = mutate(data, rng)
        return repair(changed) if rng.random() < 2 / 3 else changed

    return both
