"""Records that repeat another: by captions, by the bytes of the image, or by what it shows.

Every record gets a key of 32 bytes. Records with equal keys are duplicates, and the first of them
in the order of the source stays (`repeats.py`). Keys of images are computed shard by shard, by
threads, and kept beside the shards' rows, so that a pass that is killed goes on. The numbers of the
records that stay are kept beside the index and mapped by later runs.

`pixels` is a difference hash: the signs of the horizontal differences of the image in grey at
17 x 16 pixels. An image that is enlarged, reduced or compressed anew keeps almost all of them, so
records are duplicates where at most MAX_DISTANCE of the 256 signs differ. Candidates have one of
eight bands of 32 signs in common.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagen_jax.data.index import repeats
from imagen_jax.data.index.repeats import KEY, Keyed
from imagen_jax.data.index.shard import Shard
from imagen_jax.data.index.table import Entry, Table
from imagen_jax.data.sources.records import Reader
from imagen_jax.io import atomic, images

KINDS = ("captions", "bytes", "pixels")
_FLAT = 4  # Differences between grey levels that a hash of an image needs; fewer: it is one colour.
_VERSION = 1  # Increased when the keys or the rules change.


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
      cache: folder of the indexes, in which the result is kept.
    """
    found = known(table, kind, cache)
    if found is None:
        every = Keyed(np.arange(len(table)), keys(table, reader, kind=kind, cache=cache))
        found = publish(table, repeats.pairs(every, kind), kind=kind, cache=cache)
    return found


def without(table: Table, reader: Reader, *, kind: str, cache: pathlib.Path) -> Table:
    """The table without duplicates of a kind; arguments as of `find`."""
    if not find(table, reader, kind=kind, cache=cache).surplus:
        return table
    return table.select(np.asarray(np.load(files(table, kind, cache)[0], mmap_mode="r")))


def known(table: Table, kind: str, cache: pathlib.Path) -> Duplicates | None:
    """The result of an earlier `publish`; None: there is none."""
    rows, report = files(table, kind, cache)
    if not (rows.exists() and report.exists()):
        return None
    return Duplicates(**json.loads(report.read_text("utf-8")))


def publish(table: Table, pairs: np.ndarray, *, kind: str, cache: pathlib.Path) -> Duplicates:
    """Writes which records stay, and the report.

    Args:
      table: the records.
      pairs: numbers of two records with one key, int64[k, 2]; they connect every group.
      kind: of the keys.
      cache: folder of the indexes.
    """
    found = repeats.resolve(pairs)
    stays = np.ones(len(table), bool)
    stays[found.numbers[found.numbers != found.firsts]] = False
    surplus = len(stays) - int(stays.sum())
    result = Duplicates(kind, len(found.numbers) - surplus, surplus)
    rows, report = files(table, kind, cache)
    with atomic.file(rows) as temporary, temporary.open("wb") as out:
        np.save(out, table.numbers()[stays].astype("<i8"))
    atomic.write_json(report, result._asdict())
    return result


def files(table: Table, kind: str, cache: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The files of the row numbers that stay, and of the report."""
    shards = [[entry.file, entry.digest] for entry in table.entries]
    parts = json.dumps([_VERSION, table.fingerprint, shards]).encode()
    name = f"unique_{kind}_{hashlib.sha256(parts).hexdigest()[:16]}"
    return cache / f"{name}.npy", cache / f"{name}.json"


def overlap(own: np.ndarray, other: np.ndarray, kind: str) -> np.ndarray:
    """Which of the keys `own` are duplicates of one of `other`; their numbers."""
    first = first_of_each(np.concatenate([other.astype(KEY), own.astype(KEY)]), kind)
    return np.flatnonzero(first[len(other) :] < len(other))


def first_of_each(found: np.ndarray, kind: str) -> np.ndarray:
    """For each key the number of the first one that is its duplicate; its own: there is none.

    Args:
      found: S32[n].
      kind: of the keys.
    """
    result = np.arange(len(found))
    every = repeats.resolve(repeats.pairs(Keyed(result, found), kind))
    result[every.numbers] = every.firsts
    return result


def keys(table: Table, reader: Reader, *, kind: str, cache: pathlib.Path) -> np.ndarray:
    """The keys of all records, S32; arguments as of `find`."""
    shards = range(len(table.entries))
    parts = [shard_keys(table, reader, n, kind=kind, cache=cache) for n in shards]
    return np.concatenate([np.zeros(0, KEY), *parts])


def shard_keys(
    table: Table, reader: Reader, number: int, *, kind: str, cache: pathlib.Path
) -> np.ndarray:
    """The keys of the records of one shard, S32; `number` of the shard, the others as of `find`."""
    entry, rows = table.entries[number], table.rows_of(number)
    if not len(rows):
        return np.zeros(0, KEY)
    shard = table.shard(number)
    if kind == "captions":
        return _of_captions(shard)[rows]
    return _cached(shard, entry, number, reader=reader, kind=kind, cache=cache)[rows]


def _of_captions(shard: Shard) -> np.ndarray:
    """Hashes of the captions of each record, whatever their order."""
    hashes, ends = shard.hashes(), np.cumsum(shard.caption_counts())
    starts = ends - shard.caption_counts()
    found = [
        _digest(hashes[a].item()) if b - a == 1 else _digest(b"".join(sorted(hashes[a:b].tolist())))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return np.array(found, KEY)


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
        found = np.array(list(pool.map(key, range(entry.records), chunksize=64)), KEY)
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
