"""Types between the readers of a source and its index: records, items, the quarantine report.

A reader (folder.py, tfrecord.py, ...) yields an `Item` per record; `index/scan.py` checks each one
and builds the index from them.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.io import images, text

SMALLEST_SIDE = 8  # Pixels; smaller images are placeholders or tracking pixels.
LONG_CAPTION = 256  # Words; T5 was trained on 512 tokens, Imagen uses fewer.
CAPTION_SOURCES = (
    "captions are read from NAME.txt, NAME.caption or NAME.EXT.txt beside an image, or from "
    "metadata.jsonl, .csv or .parquet with file_name and text, caption or prompt"
)
MAX_LISTED = 1000  # Notes of one kind that the report lists by name; all are counted.
MAX_REJECTED = 100_000  # Rejected records that the report lists by name; all are counted.

Decode = Callable[[bytes], UInt8[np.ndarray, "h w 3"]]
Caption = str | bytes


class Record(NamedTuple):
    """One image (RGB pixels) with all its captions, and their weights; (): equal ones."""

    key: str
    image: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]
    weights: tuple[float, ...] = ()


class Item(NamedTuple):
    """A record as its reader lists it, before its image is read.

    Attributes:
      key: stable name of the record.
      captions: as found; bytes where the encoding is not Unicode. `index/scan.py` decodes them and
        rejects a record with no or only empty captions.
      location: where the reader finds the image.
      fault: why the record cannot be used; "": unknown to the reader.
      notes: deviations of a usable record, for the report.
      ignored: what this is where it is no record, such as junk; "": it is one.
      fields: metadata of the sample, by name: at least those that `SourceConfig.fields` names.
      kinds: for each caption its number in `data.captions`; (): that is not set.
    """

    key: str
    captions: tuple[Caption, ...] = ()
    location: Location = (0, 0, 0)
    fault: str = ""
    notes: tuple[str, ...] = ()
    ignored: str = ""
    fields: Mapping[str, Any] = {}
    kinds: tuple[int, ...] = ()


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


@runtime_checkable
class ShardedReader(Reader, Protocol):
    """A reader whose files are indexed one by one, by several processes.

    Attributes:
      shards: the files. `identity` begins with their `files.stats`.
    """

    shards: Sequence[pathlib.Path]

    def scan_shard(self, number: int) -> Iterator[Item]:
        """Lists the records of one file; their keys begin with its name (`files.names`)."""
        ...


@runtime_checkable
class HeaderReader(Protocol):
    """A reader that can read the first bytes of an image alone."""

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """At most `count` first bytes of an encoded image, and its size in bytes."""
        ...


@dataclasses.dataclass
class Quarantine:
    """Report of an index: rejected records with reasons, and notes on usable ones.

    Attributes:
      rejected: (name, reason) of the first `MAX_REJECTED` rejected records.
      unlisted: by kind, the number of further ones.
      total: number of records, rejected ones included.
      notes: by kind, (name, note) of the first `MAX_LISTED` usable records with a note: converted,
        rotated, wrong extension, long caption.
      noted: by kind, the number of notes.
      captions: by the number of captions, the number of usable images that have as many.
      ignored: by kind, the number of files that are no records, with the first five names.
    """

    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    total: int = 0
    notes: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    captions: dict[int, int] = dataclasses.field(default_factory=dict)
    ignored: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)
    unlisted: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, key: str, reason: str) -> None:
        """Adds a rejected record; `reason` is a kind with details in brackets."""
        if len(self.rejected) < MAX_REJECTED:
            self.rejected.append((key, reason))
        else:
            self.unlisted[_kind(reason)] = self.unlisted.get(_kind(reason), 0) + 1

    def merge(self, content: Mapping[str, Any], name: str = "") -> None:
        """Adds another report.

        Args:
          content: `dataclasses.asdict` of it, or that from JSON.
          name: prefix of the names of its records.
        """
        self.total += content["total"]
        for key, reason in content["rejected"]:
            self.add(name + key, reason)
        for kind, count in content.get("unlisted", {}).items():
            self.unlisted[kind] = self.unlisted.get(kind, 0) + count
        for kind, count in content["noted"].items():
            self.noted[kind] = self.noted.get(kind, 0) + count
        for kind, pairs in content["notes"].items():
            listed = self.notes.setdefault(kind, [])
            listed += [(name + key, note) for key, note in pairs[: MAX_LISTED - len(listed)]]
        for number, count in content["captions"].items():
            self.captions[int(number)] = self.captions.get(int(number), 0) + count
        for kind, (count, first) in content["ignored"].items():
            before, names = self.ignored.get(kind, (0, []))
            names = [*names, *(name + key for key in first)][:5]
            self.ignored[kind] = before + count, names

    def note(self, key: str, note: str) -> None:
        """Adds a note on a usable record; `note` is a kind with details in brackets."""
        kind = _kind(note)
        self.noted[kind] = self.noted.get(kind, 0) + 1
        if self.noted[kind] <= MAX_LISTED:
            self.notes.setdefault(kind, []).append((key, note))

    def ignore(self, key: str, kind: str) -> None:
        """Counts a file that is no record."""
        count, names = self.ignored.get(kind, (0, []))
        self.ignored[kind] = count + 1, [*names, key] if count < 5 else names

    @property
    def share(self) -> float:
        """Share of rejected records, 0..1."""
        return self.rejected_count / max(self.total, 1)

    @property
    def rejected_count(self) -> int:
        """Number of rejected records."""
        return len(self.rejected) + sum(self.unlisted.values())

    def counts(self) -> dict[str, int]:
        """Number of rejected records per kind of reason, most frequent first."""
        counted = collections.Counter(_kind(why) for _, why in self.rejected)
        return dict((counted + collections.Counter(self.unlisted)).most_common())

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
                f"{self.rejected_count} of {self.total} records quarantined ({counts}): "
                f"{self.names(5)}"
            )
        if self.noted:
            parts.append("used: " + ", ".join(f"{n} {kind}" for kind, n in self.noted.items()))
        parts = parts or [f"all {self.total} records usable"]
        if self.ignored:
            parts.append("ignored: " + self.ignored_counts())
        return "; ".join(parts)

    def ignored_counts(self) -> str:
        """Numbers of files that are no records, by kind, most frequent first."""
        rows = sorted(self.ignored.items(), key=lambda row: -row[1][0])
        return ", ".join(f"{count} {kind}" for kind, (count, _) in rows)

    def caption_counts(self) -> str:
        """How many images have how many captions, in one line."""
        return ", ".join(
            f"{images:,} image{'s' if images > 1 else ''} with {captions}"
            for captions, images in sorted(self.captions.items())
        )

    def as_json(self) -> dict[str, Any]:
        """Content of `quarantine.json`, written beside the index."""
        listed = [pair for pairs in self.notes.values() for pair in pairs]
        return {
            "total": self.total,
            "counts": self.counts(),
            "records": [{"name": key, "reason": reason} for key, reason in self.rejected],
            "used_all_the_same": self.noted,
            "notes": [{"name": key, "note": note} for key, note in listed],
            "images_by_number_of_captions": {str(k): n for k, n in sorted(self.captions.items())},
            "ignored": {
                kind: {"files": count, "first": names}
                for kind, (count, names) in self.ignored.items()
            },
        }

    def check(self, limit: float, field: str = "config.data") -> None:
        """Checks that enough records are usable.

        Raises:
          ConfigError: the share of rejected records is above `limit`, or no record is usable.
        """
        seen = f"; seen: {self.ignored_counts()}" if self.ignored else ""
        if self.total == 0:
            raise ConfigError(f"{field}.path holds no images{seen}; check the path and the kind")
        if self.share > limit or self.rejected_count == self.total:
            hint = ""
            counts = self.counts()
            if 2 * (counts.get("no caption", 0) + counts.get("missing file", 0)) > self.total:
                hint = f"{seen}; {CAPTION_SOURCES}"
            raise ConfigError(
                f"{field}.max_quarantined={limit:g} but {self.share:.1%} of the records "
                f"({self.rejected_count} of {self.total}) are unusable: {self.names(3)}{hint}; "
                f"repair or remove them, or raise --{field}.max_quarantined"
            )


def _kind(reason: str) -> str:
    return reason.split(" (")[0]


def caption_fault(captions: tuple[str, ...]) -> str:
    """Why these captions cannot be used; "" if they can."""
    if not captions:
        return "no caption"
    for caption in captions:
        if fault := text.fault(caption):
            return f"caption with {fault}"
    return "empty caption" if all(map(is_blank, captions)) else ""


def is_blank(caption: Caption) -> bool:
    """Whether nothing of a caption is visible, see `text.is_blank`; of bytes: white space."""
    return not caption.strip() if isinstance(caption, bytes) else text.is_blank(caption)


def size_fault(side: int, min_size: int) -> str:
    """Why an image whose shorter side is `side` pixels cannot be used; "" if it can."""
    limit = max(min_size, SMALLEST_SIDE)
    return f"too small ({side} px, at least {limit} required)" if side < limit else ""


def caption_notes(captions: tuple[str, ...]) -> list[str]:
    """Notes on usable captions."""
    words = max(len(caption.split()) for caption in captions)
    return [f"long caption ({words} words, cut in batches)"] if words > LONG_CAPTION else []


def clean(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Strips white space and removes empty captions."""
    return tuple(c.strip() for c in captions if not is_blank(c))


def texts_of(value: Any) -> tuple[Caption, ...]:
    """Captions of a JSON or Arrow value: a text, a list of texts, or anything else (none).

    Bytes are decoded where they are Unicode.
    """
    if isinstance(value, (list, tuple)):
        return tuple(found for item in value for found in _text_of(item))
    return _text_of(value)


def _text_of(value: Any) -> tuple[Caption, ...]:
    if not isinstance(value, bytes):
        return (str(value),) if isinstance(value, str) else ()
    try:
        return (text.decode(value),)
    except text.TextError:
        return (value,)  # Decoded again, and rejected, in the index pass.


# The records that training reads, and those that it does not, for evaluation.
Part = Literal["train", "held_out"]


@runtime_checkable
class AnySource(Protocol):
    """What the pipeline reads: an `IndexedSource`, or a `Mixture` of several."""

    fingerprint: str
    further_captions: tuple[str, ...]  # That batches may hold beside those of the records.

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

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """`hashes` in blocks, for sources larger than the memory."""
        ...

    def read(self, i: int) -> bytes:
        """The encoded image of record i. Raises ImageError: it changed."""
        ...

    def record(
        self, i: int, decode: Decode = images.decode, read: Callable[[], bytes] | None = None
    ) -> Record:
        """Record i; a damaged one is replaced by another, by a fixed rule.

        `read`: as `self.read(i)`, which may have run before.
        """
        ...

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """Record numbers of the examples g of a run."""
        ...

    def order_spec(self) -> dict[str, Any]:
        """JSON values that, with the seed, determine the record of every example."""
        ...

    def part(self, part: Part, share: float) -> AnySource:
        """The records for training, or the share of them that is held out by a hash."""
        ...
