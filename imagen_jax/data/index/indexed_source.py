"""Random access to the usable records of one source.

The index pass (scan.py) runs once and is cached beside the data: it stores the location of every
usable record and rejects the others. The order of the data is then arithmetic on record numbers
(`batches/order.py`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches.order import WINDOW, permute, permute_in_windows
from imagen_jax.data.embeddings.unit_file import caption_hash
from imagen_jax.data.index import duplicates, folders
from imagen_jax.data.index.duplicates import Duplicates
from imagen_jax.data.index.patience import PatientReader
from imagen_jax.data.index.table import Table
from imagen_jax.data.sources.records import Decode, Part, Quarantine, Reader, Record
from imagen_jax.io import images

STAND_IN_STREAM = 1 << 52  # Seed of the choice of stand-ins.
LOGGED = 10  # Damaged records that are logged one by one, and are never too many.


class IndexedSource:
    """Random access to captioned images.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
      report: rejected records; grows when an image fails to decode later.
      table: the usable records.
      reader: reads an encoded image, once.
      cache: folder of the indexes of these data.
    """

    def __init__(
        self,
        *,
        table: Table,
        reader: Reader,
        report: Quarantine,
        log: Callable[[str], None] = print,
        max_broken: float = 1.0,
        window: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Wraps the result of an index pass.

        Args:
          table: the usable records.
          reader: reads the encoded image of one.
          report: the rejected records.
          log: called with lines on records that are found damaged later, and on the store.
          max_broken: share of damaged records above which reading stops, 0..1.
          weights: `data.captions`.
          window: shuffle shards, and records within a window, instead of all records.
        """
        self.table = table
        self.reader = reader
        self._window, self._weights = window, dict(weights or {})
        self._by_kind = [self._weights[name] for name in sorted(self._weights) if name]
        # Captions beside those of the records.
        self.further_captions: tuple[str, ...] = ("",) if "" in self._weights else ()
        self.cache = reader.cache
        self._log, self._max_broken = log, max_broken
        self._broken: dict[int, None] = {}
        self._store = PatientReader(reader, log)
        self.report = report
        self.fingerprint = table.fingerprint
        self._numbers: np.ndarray | None = None  # of the records of a part; None: all
        self._part: dict[str, Any] = {}

    def part(self, part: Part, share: float) -> IndexedSource:
        """The same source with the records of one part alone.

        A record is held out by a hash of its key, whatever the other records are.

        Args:
          part: which one.
          share: of the records that are held out, 0..1; 0: every record is for training.

        Raises:
          ConfigError: the part has no records.
        """
        if share == 0 and part == "train":
            return self
        held_out = (_uniform(self.table.key(i)) < share for i in range(len(self.table)))
        chosen = np.fromiter(held_out, bool, len(self.table)) == (part == "held_out")
        if not chosen.any():
            raise ConfigError(
                f"config.data.held_out={share} leaves no record to the part {part!r} of a source "
                f"of {len(self.table)}; try 0.1"
            )
        other = copy.copy(self)
        other._numbers = np.flatnonzero(chosen)
        other._part = {"held_out": share, "part": part}
        return other

    def __len__(self) -> int:
        return len(self.table) if self._numbers is None else len(self._numbers)

    def _number(self, i: int) -> int:
        """The row of the table of record i."""
        return i if self._numbers is None else int(self._numbers[i])

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; decodes no image."""
        return self.table.captions(self._number(i))

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, of both parts, as in the embedding store."""
        return np.concatenate([*self.hash_blocks()])

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """`hashes` of one shard after the other."""
        yield from self.table.hash_blocks()
        yield np.array([caption_hash(text) for text in self.further_captions], "S16")

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """Record numbers of the examples g of a run, shuffled anew in every epoch."""
        n = len(self)
        if self._window:
            return self._windows(g, seed)
        return permute(g % n, g // n, n=n, seed=seed)

    def order_spec(self) -> dict[str, Any]:
        """JSON values that, with the seed, determine the record of every example."""
        window = {"shuffle": "window", "window": WINDOW} if self._window else {}
        weights = {"captions": self._weights} if self._weights else {}
        return {
            "examples": len(self),
            "source": self.fingerprint,
            **self._part,
            **window,
            **weights,
        }

    def _windows(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """`order` that reads some neighbouring shards at a time."""
        ends = self.table.ends()
        if self._numbers is not None:
            ends = np.searchsorted(self._numbers, ends)
        return permute_in_windows(g % len(self), g // len(self), ends=ends, seed=seed)

    def duplicates(self, kind: str) -> Duplicates:
        """How many records repeat another; `kind`: one of `duplicates.KINDS`."""
        cache = folders.writable(folders.cache_folders(self.cache))
        return duplicates.find(self.table, self.reader, kind=kind, cache=cache)

    def image_keys(self, kind: str) -> np.ndarray:
        """Keys by which records of two sources are compared; see `duplicates.keys`."""
        cache = folders.writable(folders.cache_folders(self.cache))
        return duplicates.keys(self.table, self.reader, kind=kind, cache=cache)

    def read(self, i: int) -> bytes:
        """The encoded image of record i; waits while the store fails.

        Raises:
          ImageError: the data changed since the index was made.
          StoreError: the store fails for minutes.
        """
        at = self._number(i)
        data = self._store.read(self.table.key(at), self.table.location(at))
        if len(data) != self.table.size(at):
            raise images.ImageError("changed since the index was made")
        return data

    def record(
        self, i: int, decode: Decode = images.decode, read: Callable[[], bytes] | None = None
    ) -> Record:
        """Record i, or a stand-in if its image was damaged after the index pass.

        The stand-in is chosen by a hash of i, so it is the same in every process, and record
        numbers do not shift. The report lists damaged records.

        Args:
          i: 0..len - 1.
          decode: encoded image -> pixels, or the part of them that is needed.
          read: as `self.read(i)`, which may have run before; None: that is called.

        Raises:
          ConfigError: no record decodes, or more than `max_broken` of them do not.
          StoreError: see `read`.
        """
        for attempt in range(len(self) + 1):
            chosen = i if not attempt else self._stand_in(i, attempt - 1)
            at = self._number(chosen)
            if at in self._broken:
                continue
            try:
                data = read() if read and not attempt else self.read(chosen)
                return Record(self.table.key(at), decode(data), *self._texts(at))
            except images.ImageError as error:
                self._add_broken(at, str(error))
        raise ConfigError("config.data.path: no record can be decoded any more")

    def _texts(self, at: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Captions of a row and their weights; (): equal ones."""
        captions = self.table.captions(at)
        if not self._weights:
            return captions, ()
        kinds = self.table.kinds(at)
        weights = tuple(self._by_kind[kind] / kinds.count(kind) for kind in kinds)
        empty = tuple(self._weights[text] for text in self.further_captions)
        return (*captions, *self.further_captions), (*weights, *empty)

    def _stand_in(self, i: int, attempt: int) -> int:
        """The record that replaces record i after some attempts; runs through all records."""
        number, epoch = np.array([attempt]), np.array([i])
        return int(permute(number, epoch, n=len(self), seed=STAND_IN_STREAM)[0])

    def _add_broken(self, at: int, why: str) -> None:
        """Notes a damaged record. Raises ConfigError: there are too many."""
        if at in self._broken:  # Found by another thread at the same time.
            return
        self._broken[at] = None
        count, key = len(self._broken), self.table.key(at)
        self.report.add(key, why)
        if count <= LOGGED or count & (count - 1) == 0:
            self._log(f"{key}: {why}; another record is used in its place ({count:,} so far)")
        if count > max(self._max_broken * len(self.table), LOGGED):
            raise ConfigError(
                f"config.data.max_quarantined={self._max_broken:g} but {count:,} of "
                f"{len(self.table):,} images no longer decode, the last: {key}: {why}; repair the "
                "data and run the same command again"
            )


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
