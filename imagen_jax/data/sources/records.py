"""What an index pass finds: usable records, and a report that names all that is not quite right.

Shared by the readers of the kinds of source (folder.py, tfrecord.py, ...) and by scan.py, which
makes an index of what they say.
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

SMALLEST_SIDE = 8  # Pixels; smaller pictures are placeholders and tracking pixels, not content.
LONG_CAPTION = 256  # Words; T5 learned from 512 tokens, Imagen from fewer.
NAMED = 1000  # Remarks of one sort that are listed by name; all are counted.


Decode = Callable[[bytes], UInt8[np.ndarray, "h w 3"]]


class Record(NamedTuple):
    """One picture (pixels, RGB) with all its captions."""

    key: str
    image: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]


class Item(NamedTuple):
    """What a reader says of a record before anyone looks at its picture.

    Attributes:
      key: stable name of the record.
      captions: as they are found; none, or empty ones, are for scan.py to judge.
      place: what the reader needs to find the picture again.
      fault: why the record cannot be used, if the reader knows.
      notes: what is odd about it, although it can be used.
    """

    key: str
    captions: tuple[str, ...] = ()
    place: Location = (0, 0, 0)
    fault: str = ""
    notes: tuple[str, ...] = ()


@runtime_checkable
class Reader(Protocol):
    """A kind of source: what there is, and how one picture of it is read.

    Attributes:
      cache: folder for the index.
      identity: JSON values; where they differ, the index is made anew.
    """

    cache: pathlib.Path
    identity: list[Any]

    def scan(self) -> Iterator[Item]:
        """All records in their order, without looking at pictures."""
        ...

    def read(self, key: str, place: Location) -> bytes:
        """The encoded picture of a record, from any thread. Raises ImageError or OSError."""
        ...


@dataclasses.dataclass
class Quarantine:
    """The records that are not used, each by name with the reason; nothing is dropped silently.

    Attributes:
      rejected: (name, reason) of every record that is not used.
      total: records, used or not.
      notes: by sort of remark, (name, remark) of the first `NAMED` records that are used all the
        same: converted, turned, wrongly named, captioned at length.
      noted: by sort of remark, how many there are.
    """

    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    total: int = 0
    notes: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, key: str, reason: str) -> None:
        """Names a record that is not used; `reason` is a kind with details in brackets."""
        self.rejected.append((key, reason))

    def note(self, key: str, remark: str) -> None:
        """Names a record that is used although it is odd; `remark` is a kind with details."""
        sort = _kind(remark)
        self.noted[sort] = self.noted.get(sort, 0) + 1
        if self.noted[sort] <= NAMED:
            self.notes.setdefault(sort, []).append((key, remark))

    @property
    def share(self) -> float:
        """Share of all records that are not used, 0..1."""
        return len(self.rejected) / max(self.total, 1)

    def counts(self) -> dict[str, int]:
        """Number of records per kind of reason, most frequent first."""
        return dict(collections.Counter(_kind(why) for _, why in self.rejected).most_common())

    def names(self, limit: int) -> str:
        """The first names with their reasons, in one line."""
        shown = ", ".join(f"{key}: {reason}" for key, reason in self.rejected[:limit])
        return shown + (", ..." if len(self.rejected) > limit else "")

    def summary(self) -> str:
        """A line for people: how many, why, the first of them; and what is odd about others."""
        parts = []
        if self.rejected:
            counts = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
            parts.append(
                f"{len(self.rejected)} of {self.total} records quarantined ({counts}): "
                f"{self.names(5)}"
            )
        if self.noted:
            parts.append("used: " + ", ".join(f"{n} {sort}" for sort, n in self.noted.items()))
        return "; ".join(parts) or f"all {self.total} records usable"

    def as_json(self) -> dict[str, Any]:
        """What is written for the user, beside the data."""
        listed = [pair for pairs in self.notes.values() for pair in pairs]
        return {
            "total": self.total,
            "counts": self.counts(),
            "records": [{"name": key, "reason": reason} for key, reason in self.rejected],
            "used_all_the_same": self.noted,
            "notes": [{"name": key, "note": remark} for key, remark in listed],
        }

    def check(self, limit: float, field: str = "config.data") -> None:
        """Stops a run that would train on too small a rest.

        Raises:
          ConfigError: the share is above `limit`, or nothing is left.
        """
        if self.total == 0:
            raise ConfigError(f"{field}.path holds no pictures; check the path and the kind")
        if self.share > limit or len(self.rejected) == self.total:
            raise ConfigError(
                f"{field}.max_quarantined={limit:g} but {self.share:.1%} of the records "
                f"({len(self.rejected)} of {self.total}) are unusable: {self.names(3)}; repair or "
                f"remove them, or raise --{field}.max_quarantined"
            )


def _kind(reason: str) -> str:
    return reason.split(" (")[0]


def caption_fault(captions: tuple[str, ...]) -> str:
    """Why these captions cannot be used, or nothing."""
    if not captions:
        return "no caption"
    return "" if any(c.strip() for c in captions) else "empty caption"


def size_fault(side: int, min_size: int) -> str:
    """Why a picture whose shorter side is `side` pixels cannot be used, or nothing."""
    limit = max(min_size, SMALLEST_SIDE)
    return f"too small ({side} px, at least {limit} wanted)" if side < limit else ""


def caption_notes(captions: tuple[str, ...]) -> list[str]:
    """What is odd about captions that are used."""
    words = max(len(text.split()) for text in captions)
    return (
        [f"long caption ({words} words; a batch holds the first)"] if words > LONG_CAPTION else []
    )


def clean(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions without surrounding white space, without the empty ones."""
    return tuple(c.strip() for c in captions if c.strip())


def texts_of(value: Any) -> tuple[str, ...]:
    """Captions from a JSON or Arrow value: a text, a list of texts, or neither."""
    if isinstance(value, (list, tuple)):
        return tuple(str(text) for text in value if text is not None)
    return (value,) if isinstance(value, str) else ()


def lines_of(text: str) -> tuple[str, ...]:
    """Captions from the text file of a picture: one per line."""
    return tuple(jsonl.split_lines(text) or [""])


@runtime_checkable
class AnySource(Protocol):
    """What the pipeline reads: one source, or several as one (index.Source, mixture.Mixture)."""

    fingerprint: str

    @property
    def report(self) -> Quarantine:
        """The records that are not used."""
        ...

    def __len__(self) -> int: ...

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; no picture is decoded."""
        ...

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, as the embedding store has them."""
        ...

    def record(self, i: int, decode: Decode = images.decode) -> Record:
        """Record i; if it is damaged, another one by a fixed rule."""
        ...

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """The records that are examples g of a run."""
        ...

    def about(self) -> dict[str, Any]:
        """What decides, beside the seed, which record an example is."""
        ...
