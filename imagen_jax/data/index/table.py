"""The table of an index: the usable records of all shards, in the order of the shards.

The rows stay in the files of the shards (`shard.py`), of which the last used ones are mapped. A
table holds some numbers per shard, so a billion records in a hundred thousand shards open at once.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imagen_jax.data.index import shard as shard_file
from imagen_jax.data.index.shard import Shard

Location = tuple[int, int, int]
MAX_MAPPED = 1024  # Files of shards; the number of maps of a process is limited.
# Records up to which the fingerprint is the hash of all rows, as in earlier versions; beyond, it is
# the hash of the shards' hashes.
ROWS_HASHED = 1 << 19
_LIST = "shards.json"


class Entry(NamedTuple):
    """A shard in a table.

    Attributes:
      name: of its file; the keys of its records begin with it.
      file: of its rows, in the folder of the shards' files.
      digest: hash of its rows.
      records, captions: numbers of them.
    """

    name: str
    file: str
    digest: str
    records: int
    captions: int


class Table:
    """Random access to the records of an index.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
      entries: the shards.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        open_shard: Callable[[str], Shard],
        *,
        fingerprint: str = "",
        selected: np.ndarray | None = None,
    ) -> None:
        """A table of shards.

        Args:
          entries: the shards, in order.
          open_shard: their rows, by `Entry.file`.
          fingerprint: "": computed.
          selected: row numbers of the records, ascending; None: all rows.
        """
        self.entries = list(entries)
        self._open = functools.lru_cache(MAX_MAPPED)(open_shard)
        self._ends = list(itertools.accumulate(entry.records for entry in self.entries))
        self._selected = selected
        self.fingerprint = fingerprint or self._fingerprint()

    def __len__(self) -> int:
        return self.rows if self._selected is None else len(self._selected)

    @property
    def rows(self) -> int:
        """Number of records before the selection."""
        return self._ends[-1] if self._ends else 0

    def ends(self) -> np.ndarray:
        """For each shard the number of the first record after it."""
        ends = np.array(self._ends, np.int64)
        return ends if self._selected is None else np.searchsorted(self._selected, ends)

    def key(self, i: int) -> str:
        """Name of record i."""
        number, shard, row = self._locate(i)
        return self.entries[number].name + shard.key(row)

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of record i, at least one."""
        _, shard, row = self._locate(i)
        return shard.captions(row)

    def kinds(self, i: int) -> tuple[int, ...]:
        """The number in `data.captions` of each caption of record i; (): it is not set."""
        _, shard, row = self._locate(i)
        return shard.kinds(row)

    def size(self, i: int) -> int:
        """Bytes of the encoded image of record i."""
        _, shard, row = self._locate(i)
        return shard.size(row)

    def location(self, i: int) -> Location:
        """Location of the image of record i, in the terms of its reader."""
        number, shard, row = self._locate(i)
        *file, first, second = shard.place(row)
        return (file[0] if file else number), first, second

    def numbers(self) -> np.ndarray:
        """The row numbers of all records, ascending."""
        return np.arange(self.rows) if self._selected is None else np.asarray(self._selected)

    def hashes(self) -> np.ndarray:
        """Hashes of all captions in order, S16 as in the embedding store."""
        return np.concatenate([np.zeros(0, "S16"), *self.hash_blocks()])

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """`hashes` of one shard after the other."""
        for number, entry in enumerate(self.entries):
            rows = self.rows_of(number)
            if len(rows) == 0:
                continue
            shard = self.shard(number)
            found = shard.hashes()
            if len(rows) < entry.records:
                chosen = np.zeros(entry.records, bool)
                chosen[rows] = True
                found = found[np.repeat(chosen, shard.caption_counts())]
            yield found

    def rows_of(self, number: int) -> np.ndarray:
        """Which rows of a shard are records of the table, ascending; `number` of the shard."""
        end, records = self._ends[number], self.entries[number].records
        if self._selected is None:
            return np.arange(records)
        first, last = np.searchsorted(self._selected, [end - records, end])
        return np.asarray(self._selected[first:last]) - (end - records)

    def shard(self, number: int) -> Shard:
        """The rows of a shard with records, before the selection."""
        return self._open(self.entries[number].file)

    def shards(self) -> Iterator[tuple[Entry, Shard]]:
        """All shards with records, before the selection."""
        for entry in self.entries:
            if entry.records:
                yield entry, self._open(entry.file)

    def select(self, rows: np.ndarray) -> Table:
        """The records with these row numbers, ascending."""
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(np.ascontiguousarray(rows, "<i8").tobytes())
        name = digest.hexdigest()[:16]
        return Table(self.entries, self._open, fingerprint=name, selected=rows)

    def save(self, folder: pathlib.Path) -> None:
        """Writes the list of shards, for `load`."""
        rows = [list(entry) for entry in self.entries]
        (folder / _LIST).write_text(json.dumps(rows), encoding="utf-8")
        (folder / "fingerprint.txt").write_text(self.fingerprint)

    @classmethod
    def load(cls, folder: pathlib.Path, shards: pathlib.Path) -> Table:
        """Opens the index in `folder`, of any layout.

        Args:
          folder: of `save`, or of an index of the first layout, whose columns hold all records.
          shards: the folder of the shards' files.
        """
        fingerprint = (folder / "fingerprint.txt").read_text()
        if (folder / _LIST).exists():
            rows = json.loads((folder / _LIST).read_text("utf-8"))
            entries = [Entry(*row) for row in rows]
            opened = lambda name: shard_file.read(shards / name)  # noqa: E731
            return cls(entries, opened, fingerprint=fingerprint)
        whole = Shard({path.stem: _mapped(path) for path in folder.glob("*.npy")})
        entry = Entry("", "", fingerprint, len(whole), len(whole.hashes()))
        return cls([entry], lambda _: whole, fingerprint=fingerprint)

    def _locate(self, i: int) -> tuple[int, Shard, int]:
        """Number of the shard of record i, the shard, and the number of the row in it."""
        row = i if self._selected is None else int(self._selected[i])
        if not 0 <= row < self.rows:
            raise IndexError(i)
        number = bisect.bisect_right(self._ends, row)
        entry = self.entries[number]
        return number, self._open(entry.file), row - self._ends[number] + entry.records

    def _fingerprint(self) -> str:
        if self.rows > ROWS_HASHED:
            parts = [[entry.name, entry.digest] for entry in self.entries if entry.records]
            return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        digest, separator = hashlib.sha256(b"["), b""
        for entry, shard in self.shards():
            for i in range(entry.records):
                key = entry.name + shard.key(i)
                row = shard_file.row_bytes(key, shard.size(i), shard.captions(i))
                digest.update(separator + row)
                separator = b", "
        digest.update(b"]")
        return digest.hexdigest()[:16]


def _mapped(path: pathlib.Path) -> np.ndarray:
    # A plain array on the same memory: slicing a np.memmap is several times slower.
    return np.asarray(np.load(path, mmap_mode="r"))
