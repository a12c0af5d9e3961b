"""The table of an index: one row per usable record, in memory-mapped columns.

Ten million records with one caption of 60 letters each take about 2 GB on disk; pages are read on
access, so little memory is used.
"""

from __future__ import annotations

import array
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from imagen_jax.data.embeddings.unit_file import HASH_BYTES, caption_hash

Location = tuple[int, int, int]


class TableWriter:
    """Collects rows in memory, about as many bytes as the table will have."""

    def __init__(self) -> None:
        self._keys, self._texts, self._hashes = bytearray(), bytearray(), bytearray()
        self._numbers = {name: array.array("q") for name in Table.NUMBERS}
        self._digest = hashlib.sha256(b"[")

    def append(self, key: str, captions: Sequence[str], size: int, location: Location) -> None:
        """Adds a record.

        Args:
          key: its stable name.
          captions: at least one.
          size: bytes of its encoded image.
          location: where its reader finds the image.
        """
        numbers = self._numbers
        self._digest.update(b", " if numbers["sizes"] else b"")
        self._digest.update(json.dumps([key, size, *captions]).encode())
        self._keys += _encoded(key)
        for text in captions:
            self._texts += _encoded(text)
            self._hashes += caption_hash(text)
            numbers["text_ends"].append(len(self._texts))
        numbers["key_ends"].append(len(self._keys))
        numbers["caption_ends"].append(len(numbers["text_ends"]))
        numbers["sizes"].append(size)
        numbers["places"].extend(location)

    def finish(self) -> Table:
        """The table of all rows."""
        self._digest.update(b"]")
        numbers = {name: np.frombuffer(column, np.int64) for name, column in self._numbers.items()}
        return Table(
            self._digest.hexdigest()[:16],
            keys=np.frombuffer(self._keys, np.uint8),
            texts=np.frombuffer(self._texts, np.uint8),
            hashes=np.frombuffer(self._hashes, np.uint8),
            **numbers,
        )


class Table:
    """Random access to the rows of an index.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
    """

    NUMBERS = ("key_ends", "text_ends", "caption_ends", "sizes", "places")

    def __init__(self, fingerprint: str, **columns: np.ndarray) -> None:
        """Use `TableWriter` or `load`."""
        self.fingerprint = fingerprint
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["sizes"])

    def key(self, i: int) -> str:
        """Name of record i."""
        return self._text("keys", *self._span("key_ends", i))

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of record i, at least one."""
        first, last = self._span("caption_ends", i)
        return tuple(self._text("texts", *self._span("text_ends", k)) for k in range(first, last))

    def size(self, i: int) -> int:
        """Bytes of the encoded image of record i."""
        return int(self._columns["sizes"][i])

    def location(self, i: int) -> Location:
        """Location of the image of record i, in the terms of its reader."""
        file, offset, size = self._columns["places"][3 * i : 3 * i + 3].tolist()
        return file, offset, size

    def hashes(self) -> np.ndarray:
        """Hashes of all captions in order, S16 as in the embedding store."""
        return self._columns["hashes"].view(f"S{HASH_BYTES}")

    def save(self, folder: pathlib.Path) -> None:
        """Writes one file per column."""
        for name, column in self._columns.items():
            np.save(folder / f"{name}.npy", column)
        (folder / "fingerprint.txt").write_text(self.fingerprint)

    @classmethod
    def load(cls, folder: pathlib.Path) -> Table:
        """Memory-maps the files written by `save`."""
        names = ("keys", "texts", "hashes", *cls.NUMBERS)
        columns = {name: _open(folder / f"{name}.npy") for name in names}
        return cls((folder / "fingerprint.txt").read_text(), **columns)

    def _span(self, name: str, i: int) -> tuple[int, int]:
        ends = self._columns[name]
        return (int(ends[i - 1]) if i else 0), int(ends[i])

    def _text(self, name: str, start: int, end: int) -> str:
        return self._columns[name][start:end].tobytes().decode("utf-8", "surrogatepass")


def _open(path: pathlib.Path) -> np.ndarray:
    # A plain array on the same memory: slicing a np.memmap is several times slower.
    return np.asarray(np.load(path, mmap_mode="r"))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
