"""Types between the readers of a source and its index: records, items, the quarantine report.

A reader (folder.py, tfrecord.py, ...) yields an `Item` per record; `index/scan.py` checks each one
and builds the index from them.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.io import images, jsonl

SMALLEST_SIDE = 8  # Pixels; smaller images are placeholders or tracking pixels.
LONG_CAPTION = 256  # Words; T5 was trained on 512 tokens, Imagen uses fewer.
MAX_LISTED = 1000  # Notes of one kind that the report lists by name; all are counted.

Decode = Callable[[bytes], UInt8[np.ndarray, "h w 3"]]


class Record(NamedTuple):
    """One image (RGB pixels) with all its captions."""

    key: str
    image: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]


class Item(NamedTuple):
    """A record as its reader lists it, before its image is read.

    Attributes:
      key: stable name of the record.
      captions: as found; `index/scan.py` rejects a record with no or only empty captions.
      location: where the reader finds the image.
      fault: why the record cannot be used; "": unknown to the reader.
      notes: deviations of a usable record, for the report.
    """

    key: str
    captions: tuple[str, ...] = ()
    location: Location = (0, 0, 0)
    fault: str = ""
    notes: tuple[str, ...] = ()


@runtime_checkable
class Reader(Protocol):
    """A kind of source: lists its records and reads the image of one.

    Attributes:
      cache: folder for the index.
      identity: JSON values; the index is rebuilt when they change.
    """

    cache: pathlib.Path
    identity: list[Any]

    def scan(self) -> Iterator[Item]:
        """Lists all records in their order, without reading images."""
        ...

    def read(self, key: str, location: Location) -> bytes:
        """Reads the encoded image of a record; thread-safe. Raises ImageError or OSError."""
        ...


@dataclasses.dataclass
class Quarantine:
    """Report of an index: rejected records with reasons, and notes on usable ones.

    Attributes:
      rejected: (name, reason) of every rejected record.
      total: number of records, rejected ones included.
      notes: by kind, (name, note) of the first `MAX_LISTED` usable records with a note: converted,
        rotated, wrong extension, long caption.
      noted: by kind, the number of notes.
    """

    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    total: int = 0
    notes: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, key: str, reason: str) -> None:
        """Adds a rejected record; `reason` is a kind with details in brackets."""
        self.rejected.append((key, reason))

    def note(self, key: str, note: str) -> None:
        """Adds a note on a usable record; `note` is a kind with details in brackets."""
        kind = _kind(note)
        self.noted[kind] = self.noted.get(kind, 0) + 1
        if self.noted[kind] <= MAX_LISTED:
            self.notes.setdefault(kind, []).append((key, note))

    @property
    def share(self) -> float:
        """Share of rejected records, 0..1."""
        return len(self.rejected) / max(self.total, 1)

    def counts(self) -> dict[str, int]:
        """Number of rejected records per kind of reason, most frequent first."""
        return dict(collections.Counter(_kind(why) for _, why in self.rejected).most_common())

    def names(self, limit: int) -> str:
        """The first `limit` rejected records with their reasons, in one line."""
        shown = ", ".join(f"{key}: {reason}" for key, reason in self.rejected[:limit])
        return shown + (", ..." if len(self.rejected) > limit else "")

    def summary(self) -> str:
        """One line: number and kinds of rejected records, the first five, and counts of notes."""
        parts = []
        if self.rejected:
            counts = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
            parts.append(
                f"{len(self.rejected)} of {self.total} records quarantined ({counts}): "
                f"{self.names(5)}"
            )
        if self.noted:
            parts.append("used: " + ", ".join(f"{n} {kind}" for kind, n in self.noted.items()))
        return "; ".join(parts) or f"all {self.total} records usable"

    def as_json(self) -> dict[str, Any]:
        """Content of `quarantine.json`, written beside the index."""
        listed = [pair for pairs in self.notes.values() for pair in pairs]
        return {
            "total": self.total,
            "counts": self.counts(),
            "records": [{"name": key, "reason": reason} for key, reason in self.rejected],
            "used_all_the_same": self.noted,
            "notes": [{"name": key, "note": note} for key, note in listed],
        }

    def check(self, limit: float, field: str = "config.data") -> None:
        """Checks that enough records are usable.

        Raises:
          ConfigError: the share of rejected records is above `limit`, or no record is usable.
        """
        if self.total == 0:
            raise ConfigError(f"{field}.path holds no images; check the path and the kind")
        if self.share > limit or len(self.rejected) == self.total:
            raise ConfigError(
                f"{field}.max_quarantined={limit:g} but {self.share:.1%} of the records "
                f"({len(self.rejected)} of {self.total}) are unusable: {self.names(3)}; repair or "
                f"remove them, or raise --{field}.max_quarantined"
            )


def _kind(reason: str) -> str:
    return reason.split(" (")[0]


def caption_fault(captions: tuple[str, ...]) -> str:
    """Why these captions cannot be used; "" if they can."""
    if not captions:
        return "no caption"
    return "" if any(c.strip() for c in captions) else "empty caption"


def size_fault(side: int, min_size: int) -> str:
    """Why an image whose shorter side is `side` pixels cannot be used; "" if it can."""
    limit = max(min_size, SMALLEST_SIDE)
    return f"too small ({side} px, at least {limit} required)" if side < limit else ""


def caption_notes(captions: tuple[str, ...]) -> list[str]:
    """Notes on usable captions."""
    words = max(len(text.split()) for text in captions)
    return [f"long caption ({words} words, cut in batches)"] if words > LONG_CAPTION else []


def clean(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Strips white space and removes empty captions."""
    return tuple(c.strip() for c in captions if c.strip())


def texts_of(value: Any) -> tuple[str, ...]:
    """Captions of a JSON or Arrow value: a string, a list of strings, or anything else (none)."""
    if isinstance(value, (list, tuple)):
        return tuple(str(text) for text in value if text is not None)
    return (value,) if isinstance(value, str) else ()


CAPTION_LINES = 2  # Increased when `lines_of` changes; part of a reader's identity.


def lines_of(text: str) -> tuple[str, ...]:
    """Captions of an image's text file: one per line."""
    return tuple(jsonl.split_lines(text) or [""])


@runtime_checkable
class AnySource(Protocol):
    """What the pipeline reads: an `IndexedSource`, or a `Mixture` of several."""

    fingerprint: str

    @property
    def report(self) -> Quarantine:
        """Rejected records and notes."""
        ...

    def __len__(self) -> int: ...

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; decodes no image."""
        ...

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, as in the embedding store."""
        ...

    def record(self, i: int, decode: Decode = images.decode) -> Record:
        """Record i; a damaged one is replaced by another, by a fixed rule."""
        ...

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """Record numbers of the examples g of a run."""
        ...

    def order_spec(self) -> dict[str, Any]:
        """JSON values that, with the seed, determine the record of every example."""
        ...
