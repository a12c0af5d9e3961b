"""Random access to the usable records of one source.

The index pass (scan.py) runs once and is cached beside the data: it stores the location of every
usable record and rejects the others. The order of the data is then arithmetic on record numbers
(`batches/order.py`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches.order import permute
from imagen_jax.data.index.table import Table
from imagen_jax.data.sources.records import Decode, Part, Quarantine, Reader, Record
from imagen_jax.io import images


class IndexedSource:
    """Random access to captioned images.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
      report: rejected records; grows when an image fails to decode later.
      table: the usable records.
      cache: folder of the indexes of these data.
    """

    def __init__(
        self,
        *,
        table: Table,
        reader: Reader,
        report: Quarantine,
        log: Callable[[str], None] = print,
    ) -> None:
        """Wraps the result of an index pass.

        Args:
          table: the usable records.
          reader: reads the encoded image of one.
          report: the rejected records.
          log: called with one line per record that is found damaged later.
        """
        self.table = table
        self._reader = reader
        self.cache = reader.cache
        self._log = log
        self._broken: set[int] = set()
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
        return self.table.hashes()

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """Record numbers of the examples g of a run, shuffled anew in every epoch."""
        n = len(self)
        return permute(g % n, g // n, n=n, seed=seed)

    def order_spec(self) -> dict[str, Any]:
        """JSON values that, with the seed, determine the record of every example."""
        return {"examples": len(self), "source": self.fingerprint, **self._part}

    def record(self, i: int, decode: Decode = images.decode) -> Record:
        """Record i, or the next one that decodes if it was damaged after the index pass.

        The replacement is fixed, so record numbers do not shift. The report lists damaged records.

        Args:
          i: 0..len - 1.
          decode: encoded image -> pixels, or the part of them that is needed.

        Raises:
          ConfigError: no record decodes.
        """
        for offset in range(len(self)):
            at = self._number((i + offset) % len(self))
            if at in self._broken:
                continue
            key = self.table.key(at)
            try:
                data = self._reader.read(key, self.table.location(at))
                if len(data) != self.table.size(at):
                    raise images.ImageError("changed since the index was made")
                return Record(key, decode(data), self.table.captions(at))
            except (images.ImageError, OSError) as error:
                self._broken.add(at)
                self.report.add(key, str(error))
                self._log(f"{key}: {error}; the next record is used in its place")
        raise ConfigError("config.data.path: no record can be decoded any more")


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
