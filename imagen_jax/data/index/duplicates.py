"""Records that repeat another: by captions, by the bytes of the image, or by what it shows.

Every record gets a key of 32 bytes. Records with equal keys are duplicates, and the first of them
in the order of the source stays. Keys of images are computed shard by shard, by threads, and kept
beside the shards' rows, so that a pass that is killed goes on.

`pixels` is a difference hash: the signs of the horizontal differences of the image in grey at
17 x 16 pixels. An image that is enlarged, reduced or compressed anew keeps almost all of them, so
records are duplicates where at most MAX_DISTANCE of the 256 signs differ. Candidates have one of
eight bands of 32 signs in common.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagen_jax.data.index.shard import Shard
from imagen_jax.data.index.table import Entry, Table
from imagen_jax.data.sources.records import Reader
from imagen_jax.io import atomic, images

KINDS = ("captions", "bytes", "pixels")
MAX_DISTANCE = 16  # Signs of 256; unrelated images differ in about half.
_KEY_BYTES, _BANDS = 32, 8
_KEY = f"S{_KEY_BYTES}"
_FLAT = 4  # Differences between grey levels that a hash of an image needs; fewer: it is one colour.


class Duplicates(NamedTuple):
    """How many records of a source have a key in common.

    Attributes:
      kind: of the keys, one of KINDS.
      groups: sets of two or more records with one key.
      surplus: records beyond the first of each group.
    """

    kind: str
    groups: int
    surplus: int


def find(table: Table, reader: Reader, *, kind: str, cache: pathlib.Path) -> Duplicates:
    """Counts the duplicates of a source.

    Args:
      table: the records.
      reader: reads their images.
      kind: one of KINDS.
      cache: folder of the indexes.
    """
    counts = np.bincount(first_of_each(keys(table, reader, kind=kind, cache=cache), kind))
    return Duplicates(kind, int((counts > 1).sum()), int((counts[counts > 0] - 1).sum()))


def without(table: Table, reader: Reader, *, kind: str, cache: pathlib.Path) -> Table:
    """The table without duplicates of a kind; arguments as of `find`."""
    kept = np.unique(first_of_each(keys(table, reader, kind=kind, cache=cache), kind))
    return table if len(kept) == len(table) else table.select(table.numbers()[kept])


def overlap(own: np.ndarray, other: np.ndarray, kind: str) -> np.ndarray:
    """Which of the keys `own` are duplicates of one of `other`; their numbers."""
    first = first_of_each(np.concatenate([other.astype(_KEY), own.astype(_KEY)]), kind)
    return np.flatnonzero(first[len(other) :] < len(other))


def first_of_each(found: np.ndarray, kind: str) -> np.ndarray:
    """For each key the number of the first one that is its duplicate; its own: there is none.

    Args:
      found: S32[n].
      kind: of the keys.
    """
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    result = first[inverse]
    if kind != "pixels" or len(first) < 2:
        return result
    distinct = found[first].view("u1").reshape(-1, _KEY_BYTES)
    parents = dict[int, int]()

    def root(i: int) -> int:
        while i in parents:
            i = parents[i]
        return i

    for one, other in _near(distinct).tolist():
        low, high = sorted((root(int(first[one])), root(int(first[other]))))
        if low != high:
            parents[high] = low
    changed = {number: root(number) for number in parents}
    for at in np.flatnonzero(np.isin(result, list(changed))):
        result[at] = changed[int(result[at])]
    return result


def _near(distinct: np.ndarray) -> np.ndarray:
    """Pairs of rows of u1[n, 32] with at most MAX_DISTANCE different bits, int[pairs, 2].

    Rows with a band in common are compared with the first of them.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(_BANDS):
        width = _KEY_BYTES // _BANDS
        column = np.ascontiguousarray(distinct[:, band * width : (band + 1) * width]).view("<u4")
        order = np.argsort(column[:, 0], kind="stable")
        values = column[order, 0]
        starts = np.flatnonzero(np.diff(values, prepend=values[:1] ^ 1))
        lengths = np.diff(starts, append=len(values))
        others, firsts = order, order[np.repeat(starts, lengths)]
        others, firsts = others[others != firsts], firsts[others != firsts]
        differing = np.bitwise_count(distinct[others] ^ distinct[firsts]).sum(axis=1)
        near = differing <= MAX_DISTANCE
        pairs.append(np.stack([firsts[near], others[near]], axis=1))
    return np.concatenate(pairs)


def keys(table: Table, reader: Reader, *, kind: str, cache: pathlib.Path) -> np.ndarray:
    """The keys of all records, S32; arguments as of `find`."""
    parts = [np.zeros(0, _KEY)]
    for number, (entry, shard) in enumerate(zip(table.entries, _shards(table), strict=True)):
        if not entry.records or shard is None:
            continue
        if kind == "captions":
            parts.append(_of_captions(shard))
        else:
            parts.append(_cached(shard, entry, number, reader=reader, kind=kind, cache=cache))
    return np.concatenate(parts)[table.numbers()]


def _shards(table: Table) -> Iterator[Shard | None]:
    found = table.shards()
    for entry in table.entries:
        yield next(found)[1] if entry.records else None


def _of_captions(shard: Shard) -> np.ndarray:
    """Hashes of the captions of each record, whatever their order."""
    hashes, ends = shard.hashes(), np.cumsum(shard.caption_counts())
    starts = ends - shard.caption_counts()
    found = [
        _digest(hashes[a].item()) if b - a == 1 else _digest(b"".join(sorted(hashes[a:b].tolist())))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return np.array(found, _KEY)


def _cached(
    shard: Shard,
    entry: Entry,
    number: int,
    *,
    reader: Reader,
    kind: str,
    cache: pathlib.Path,
) -> np.ndarray:
    """The keys of the images of a shard; kept in a file beside its rows."""
    name = entry.file.removesuffix(".safetensors") or "whole"
    file = cache / "shards" / f"{name}_{entry.digest[:8]}.{kind}.npy"
    if file.exists():
        return np.load(file)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def key(i: int) -> bytes:
        place = shard.place(i)
        location = (place[-3] if len(place) == 3 else number, place[-2], place[-1])
        return _of_image(reader, entry.name + shard.key(i), location, kind)

    with ThreadPoolExecutor(threads) as pool:
        found = np.array(list(pool.map(key, range(entry.records), chunksize=64)), _KEY)
    with atomic.file(file) as temporary, temporary.open("wb") as out:
        np.save(out, found)
    return found


def _of_image(reader: Reader, key: str, location: tuple[int, int, int], kind: str) -> bytes:
    """The key of an image; that of its name where it cannot be read."""
    try:
        return image_key(reader.read(key, location), kind)
    except images.ImageError:
        return _digest(key.encode("utf-8", "surrogatepass"))


def image_key(data: bytes, kind: str) -> bytes:
    """The key of an encoded image.

    Args:
      data: an image file.
      kind: bytes or pixels.

    Raises:
      ImageError: see `images.decode`.
    """
    if kind == "bytes":
        return _digest(data)
    small = _reduced(data)
    if int(small.max()) - int(small.min()) < _FLAT:
        # Of one colour: the hash would be that of noise.
        return _digest(small.tobytes())
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes()


def _reduced(data: bytes) -> np.ndarray:
    """An image in grey at 17 x 16 pixels."""
    with images.decoded(data) as pixels:
        grey = Image.fromarray(pixels).convert("L")
        return np.asarray(grey.resize((17, 16), Image.Resampling.BOX)).astype(np.int64)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def describe(found: Sequence[Duplicates], records: int) -> list[str]:
    """A line per kind of duplicate, for output."""
    return [
        f"duplicates by {one.kind}: {one.surplus:,} of {records:,} records, "
        f"in {one.groups:,} groups; --config.data.unique={one.kind} removes them"
        for one in found
    ]
