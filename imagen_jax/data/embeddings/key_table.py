"""The sorted table of a store's captions, memory-mapped: opening it reads nothing.

Columns are files of 16 bytes (hash of a caption), 4 (number of the unit), 8 (offset of the first
row in the unit, tokens) and 4 (tokens), in ascending order of the hashes. It is made with bounded
memory: captions are distributed to parts by the start of their hash, and each part is sorted.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from imagen_jax.data.embeddings.unit_file import HASH_BYTES
from imagen_jax.io import atomic

PART = 1 << 22  # Captions that are sorted in memory.
_ROW = np.dtype([("key", f"S{HASH_BYTES}"), ("unit", "<u4"), ("offset", "<i8"), ("count", "<i4")])
_COLUMNS = ("key", "unit", "offset", "count")


class KeyTable(NamedTuple):
    """The captions of a store in ascending order of their hashes.

    Attributes:
      keys: hashes, S16.
      units: number of the unit of each caption.
      offsets: of its first row in the unit, tokens.
      counts: its tokens.
    """

    keys: np.ndarray
    units: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray


class UnitKeys(NamedTuple):
    """Hashes and token counts of the captions of a unit."""

    keys: np.ndarray
    counts: np.ndarray


def build(units: Iterable[UnitKeys]) -> KeyTable:
    """The table of some units in memory."""
    rows = np.concatenate([_rows(number, unit) for number, unit in enumerate(units)])
    rows = rows[np.argsort(rows["key"])]
    return KeyTable(*(np.ascontiguousarray(rows[name]) for name in _COLUMNS))


def write(folder: pathlib.Path, units: Iterable[UnitKeys], *, tag: str, captions: int) -> None:
    """Writes the table of a store.

    Args:
      folder: of the store.
      units: in their order.
      tag: part of the names of the files: a hash of the units.
      captions: number of all captions.
    """
    bits = max(-(-captions // PART) - 1, 0).bit_length()
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(atomic.file(path))
            for name, path in zip(_COLUMNS, paths(folder, tag), strict=True)
        }
        out = {
            name: np.lib.format.open_memmap(path, "w+", _ROW[name], (captions,))
            for name, path in columns.items()
        }
        at = 0
        for part in _parts(folder, units, bits):
            ordered = part[np.argsort(part["key"], kind="stable")]
            for name, column in out.items():
                column[at : at + len(part)] = ordered[name]
            at += len(part)
        for column in out.values():
            column.flush()


def read(folder: pathlib.Path, tag: str) -> KeyTable | None:
    """Maps the table of a store; None: it has none of these units."""
    found = paths(folder, tag)
    if not all(path.exists() for path in found):
        return None
    # Plain arrays on the same memory: a np.memmap is several times slower.
    return KeyTable(*(np.asarray(np.load(path, mmap_mode="r")) for path in found))


def paths(folder: pathlib.Path, tag: str) -> list[pathlib.Path]:
    return [folder / f"keys_{tag}_{name}.npy" for name in _COLUMNS]


def _rows(number: int, unit: UnitKeys) -> np.ndarray:
    rows = np.empty(len(unit.keys), _ROW)
    rows["key"], rows["unit"], rows["count"] = unit.keys, number, unit.counts
    rows["offset"] = np.cumsum(unit.counts, dtype=np.int64) - unit.counts
    return rows


def _parts(folder: pathlib.Path, units: Iterable[UnitKeys], bits: int) -> Iterator[np.ndarray]:
    """The rows of all units in parts of ascending hashes, split by their first `bits` bits."""
    if not bits:
        yield np.concatenate([_rows(number, unit) for number, unit in enumerate(units)])
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".keys.") as name:
        paths = [pathlib.Path(name) / str(part) for part in range(1 << bits)]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for number, unit in enumerate(units):
                rows = _rows(number, unit)
                starts = np.ascontiguousarray(rows["key"]).view("u1").reshape(-1, HASH_BYTES)
                first = (starts[:, 0].astype(np.int64) << 8 | starts[:, 1]) >> (16 - bits)
                for part in np.unique(first):
                    files[part].write(rows[first == part].tobytes())
        for path in paths:
            yield np.fromfile(path, _ROW)
