"""Several sources read as one, at exact rates.

Rates of 3 and 1 make blocks of four examples: in each, three come from the first source and one
from the second, in an order of their own. Within its source an example has its own number, so that
every source is gone through epoch by epoch, each in a new shuffled order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.config.data import mixture_block
from imagen_jax.data.batches.order import permute
from imagen_jax.data.sources.records import AnySource, Decode, Quarantine, Record
from imagen_jax.io import images

# Added to the seed, so that sources of one size and the blocks are shuffled differently.
SOURCE_STREAM, BLOCK_STREAM = 1 << 32, 1 << 48


class Mixture:
    """Sources side by side: record numbers of the second follow those of the first.

    Attributes:
      fingerprint: of all sources and their rates, 16 hex digits each.
      report: the records of all sources that are not used.
    """

    def __init__(self, sources: Mapping[str, AnySource], rates: Mapping[str, float]) -> None:
        """Mixes `sources` at `rates`, both by name. Raises ConfigError for impossible rates."""
        self._sources = dict(sources)
        self._block = mixture_block(dict(rates))
        self._counts = np.array(list(self._block.values()), np.int64)
        # Where in a block, and where among all records, each source begins.
        self._slots = np.cumsum(self._counts) - self._counts
        self._ends = np.cumsum([len(source) for source in self._sources.values()])
        self.fingerprint = "+".join(source.fingerprint for source in self._sources.values())

    @property
    def report(self) -> Quarantine:
        """The records that are not used, each after the name of its source."""
        whole = Quarantine()
        for name, source in self._sources.items():
            whole.rejected += [(f"{name}:{key}", why) for key, why in source.report.rejected]
            whole.total += source.report.total
        return whole

    def __len__(self) -> int:
        return int(self._ends[-1])

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; no picture is decoded."""
        _, source, local = self._locate(i)
        return source.captions(local)

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, as the embedding store has them."""
        return np.concatenate([source.hashes() for source in self._sources.values()])

    def record(self, i: int, decode: Decode = images.decode) -> Record:
        """Record i; if it is damaged, another one of the same source (see `Source.record`)."""
        name, source, local = self._locate(i)
        record = source.record(local, decode)
        return record._replace(key=f"{name}:{record.key}")

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """The records that are examples g of a run."""
        size = int(self._counts.sum())
        block = g // size
        slot = permute(g % size, block, n=size, seed=seed + BLOCK_STREAM)
        which = np.searchsorted(self._slots, slot, side="right") - 1
        # The example's number within its source: a whole block further, `counts` further.
        local = block * self._counts[which] + slot - self._slots[which]
        records = np.empty_like(g)
        for index, source in enumerate(self._sources.values()):
            mine = which == index
            own = source.order(local[mine], seed + SOURCE_STREAM * index)
            records[mine] = own + self._ends[index] - len(source)
        return records

    def about(self) -> dict[str, Any]:
        """What decides, beside the seed, which record an example is."""
        return {
            "examples": len(self),
            "source": self.fingerprint,
            "block": list(self._block.values()),
        }

    def _locate(self, i: int) -> tuple[str, AnySource, int]:
        index = int(np.searchsorted(self._ends, i, side="right"))
        name, source = list(self._sources.items())[index]
        return name, source, i - int(self._ends[index]) + len(source)
