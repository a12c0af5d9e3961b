"""The table of an index: one row per usable record, in columns that are read by memory map.

Ten million records with one caption of 60 letters each are about 2 GB on disk and, since nothing
is read before it is asked for, next to nothing in memory.
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
    """Collects rows; keeps about as many bytes as the table will have."""

    def __init__(self) -> None:
        self._keys, self._texts, self._hashes = bytearray(), bytearray(), bytearray()
        self._numbers = {name: array.array("q") for name in Table.NUMBERS}
        self._digest = hashlib.sha256(b"[")

    def append(self, key: str, captions: Sequence[str], size: int, place: Location) -> None:
        """Adds a record.

        Args:
          key: its stable name.
          captions: at least one.
          size: bytes of its encoded picture.
          place: what its reader needs to find it again.
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
        numbers["places"].extend(place)

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
        """Bytes of the encoded picture of record i."""
        return int(self._columns["sizes"][i])

    def place(self, i: int) -> Location:
        """Where record i lies, as its reader understands it."""
        file, offset, size = self._columns["places"][3 * i : 3 * i + 3].tolist()
        return file, offset, size

    def hashes(self) -> np.ndarray:
        """Hashes of all captions in order, S16 as the embedding store has them."""
        return self._columns["hashes"].view(f"S{HASH_BYTES}")

    def save(self, folder: pathlib.Path) -> None:
        """Writes one file per column."""
        for name, column in self._columns.items():
            np.save(folder / f"{name}.npy", column)
        (folder / "fingerprint.txt").write_text(self.fingerprint)

    @classmethod
    def load(cls, folder: pathlib.Path) -> Table:
        """Opens what `save` wrote; nothing is read yet."""
        names = ("keys", "texts", "hashes", *cls.NUMBERS)
        columns = {name: _open(folder / f"{name}.npy") for name in names}
        return cls((folder / "fingerprint.txt").read_text(), **columns)

    def _span(self, name: str, i: int) -> tuple[int, int]:
        ends = self._columns[name]
        return (int(ends[i - 1]) if i else 0), int(ends[i])

    def _text(self, name: str, start: int, end: int) -> str:
        return self._columns[name][start:end].tobytes().decode("utf-8", "surrogatepass")


def _open(path: pathlib.Path) -> np.ndarray:
    # As plain arrays: slicing a np.memmap costs several times as much.
    return np.asarray(np.load(path, mmap_mode="r"))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
