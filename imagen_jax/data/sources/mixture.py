"""Several sources read as one, at exact rates.

Rates of 3 and 1 make blocks of four examples: three from the first source and one from the second,
shuffled within the block. Each source counts its own examples, so it has its own epochs, each in a
new shuffled order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.config.data import mixture_block
from imagen_jax.data.batches.order import permute
from imagen_jax.data.sources.records import AnySource, Decode, Part, Quarantine, Record
from imagen_jax.io import images

# Added to the seed: sources of equal size and the blocks get different permutations.
SOURCE_STREAM, BLOCK_STREAM = 1 << 32, 1 << 48


class Mixture:
    """Concatenated sources: record numbers of the second follow those of the first.

    Attributes:
      fingerprint: of all sources, 16 hex digits each.
      report: the rejected records of all sources.
      sources: by name.
    """

    def __init__(self, sources: Mapping[str, AnySource], rates: Mapping[str, float]) -> None:
        """Mixes `sources` at `rates`, both by name. Raises ConfigError: see `mixture_block`."""
        self.sources = dict(sources)
        self._rates = dict(rates)
        self._part: dict[str, Any] = {}
        self._block = mixture_block(dict(rates))
        self._counts = np.array(list(self._block.values()), np.int64)
        # First slot of each source in a block.
        self._slots = np.cumsum(self._counts) - self._counts
        self._ends = np.cumsum([len(source) for source in self.sources.values()])
        self.fingerprint = "+".join(source.fingerprint for source in self.sources.values())

        further = [text for source in self.sources.values() for text in source.further_captions]
        self.further_captions = tuple(dict.fromkeys(further))

    def part(self, part: Part, share: float) -> Mixture:
        """One part of every source, at the same rates; see `IndexedSource.part`."""
        sources = {name: source.part(part, share) for name, source in self.sources.items()}
        mixture = Mixture(sources, self._rates)
        mixture._part = {"held_out": share, "part": part}
        return mixture

    @property
    def report(self) -> Quarantine:
        """Rejected records, each prefixed with the name of its source."""
        whole = Quarantine()
        for name, source in self.sources.items():
            whole.rejected += [(f"{name}:{key}", why) for key, why in source.report.rejected]
            whole.total += source.report.total
            for number, count in source.report.captions.items():
                whole.captions[number] = whole.captions.get(number, 0) + count
        return whole

    def __len__(self) -> int:
        return int(self._ends[-1])

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; decodes no image."""
        _, source, local = self._locate(i)
        return source.captions(local)

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, as in the embedding store."""
        return np.concatenate([source.hashes() for source in self.sources.values()])

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """`hashes` in blocks."""
        for source in self.sources.values():
            yield from source.hash_blocks()

    def read(self, i: int) -> bytes:
        """The encoded image of record i; see `IndexedSource.read`."""
        _, source, local = self._locate(i)
        return source.read(local)

    def record(
        self, i: int, decode: Decode = images.decode, read: Callable[[], bytes] | None = None
    ) -> Record:
        """Record i; a damaged one is replaced by another of its source (`IndexedSource.record`)."""
        name, source, local = self._locate(i)
        record = source.record(local, decode, read)
        return record._replace(key=f"{name}:{record.key}")

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """Record numbers of the examples g of a run."""
        size = int(self._counts.sum())
        block = g // size
        slot = permute(g % size, block, n=size, seed=seed + BLOCK_STREAM)
        which = np.searchsorted(self._slots, slot, side="right") - 1
        # Number of the example within its source; each block adds `counts`.
        local = block * self._counts[which] + slot - self._slots[which]
        records = np.empty_like(g)
        for index, source in enumerate(self.sources.values()):
            selected = which == index
            order = source.order(local[selected], seed + SOURCE_STREAM * index)
            records[selected] = order + self._ends[index] - len(source)
        return records

    def order_spec(self) -> dict[str, Any]:
        """JSON values that, with the seed, determine the record of every example."""
        common = {"examples", "source", *self._part}
        own = {
            name: further
            for name, source in self.sources.items()
            if (further := {k: v for k, v in source.order_spec().items() if k not in common})
        }
        return {
            "examples": len(self),
            "source": self.fingerprint,
            "block": list(self._block.values()),
            **self._part,
            **({"sources": own} if own else {}),
        }

    def _locate(self, i: int) -> tuple[str, AnySource, int]:
        index = int(np.searchsorted(self._ends, i, side="right"))
        name, source = list(self.sources.items())[index]
        return name, source, i - int(self._ends[index]) + len(source)
