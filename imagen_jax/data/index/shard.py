"""The rows of one shard of an index as one file: columns that are read by memory map.

A file is made by whoever scans the shard and never changes. It depends on the shard's content and
the rules of the check only: keys are stored without the shard's name, and places without its
number, so that a shard keeps its file when it is copied or when others are added.

The format is safetensors: one array per column, and the shard's report as JSON in the metadata.
"""

from __future__ import annotations

import array
import hashlib
import json
import mmap
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from imagen_jax.data.embeddings.unit_file import HASH_BYTES, caption_hash
from imagen_jax.io import atomic

Field = float | int | bool | str | None
FIELD = "field."  # Prefix of the names of the columns of metadata.
_REPORT = "shard"
_DTYPES = {"I64": "<i8", "U32": "<u4", "I32": "<i4", "F64": "<f8", "U8": "u1"}


class Row(NamedTuple):
    """A usable record.

    Attributes:
      key: its stable name, without the name of the shard.
      captions: at least one.
      size: bytes of its encoded image.
      place: where its reader finds the image in the shard; of a source without shards: anywhere.
      image_size: width and height of the image, pixels; (0, 0): unknown.
      fields: requested metadata of the sample, by name.
      kinds: for each caption its number in `data.captions`.
    """

    key: str
    captions: Sequence[str]
    size: int
    place: tuple[int, ...]
    image_size: tuple[int, int] = (0, 0)
    fields: Mapping[str, Field] = {}
    kinds: Sequence[int] = ()


class ShardWriter:
    """Collects the rows of a shard in columns."""

    def __init__(self, fields: Sequence[str] = ()) -> None:
        """An empty shard; `fields` are the names of its columns of metadata."""
        self._keys, self._texts, self._hashes = bytearray(), bytearray(), bytearray()
        self._numbers = {name: array.array("q") for name in _NUMBERS}
        self._fields: dict[str, list[Field]] = {name: [] for name in fields}
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._numbers["sizes"])

    def append(self, row: Row) -> None:
        """Adds a record."""
        numbers = self._numbers
        self._digest.update(row_bytes(row.key, row.size, row.captions))
        self._keys += _encoded(row.key)
        for text in row.captions:
            self._texts += _encoded(text)
            self._hashes += caption_hash(text)
            numbers["text_ends"].append(len(self._texts))
        numbers["key_ends"].append(len(self._keys))
        numbers["caption_ends"].append(len(numbers["text_ends"]))
        numbers["sizes"].append(row.size)
        numbers["places"].extend(row.place)
        numbers["image_sizes"].extend(row.image_size)
        numbers["kinds"].extend(row.kinds)
        for name, values in self._fields.items():
            values.append(row.fields.get(name))

    def finish(self) -> tuple[dict[str, np.ndarray], str]:
        """The columns, and a hash of all keys, sizes and captions."""
        columns = {
            name: np.array(self._numbers[name], dtype).astype(dtype)
            for name, dtype in _NUMBERS.items()
        }
        for name, content in (
            ("keys", self._keys),
            ("texts", self._texts),
            ("hashes", self._hashes),
        ):
            columns[name] = np.frombuffer(bytes(content), np.uint8)
        for name, values in self._fields.items():
            columns |= _field_columns(FIELD + name, values)
        return columns, self._digest.hexdigest()[:32]


# Columns of numbers. Ends are offsets in bytes, or in captions, of the first value after a row.
_NUMBERS = {
    "key_ends": "<u4",
    "text_ends": "<u4",
    "caption_ends": "<u4",
    "sizes": "<i8",
    "places": "<i8",
    "image_sizes": "<i4",
    "kinds": "u1",
}


class Shard:
    """Random access to the rows of a shard."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        """Wraps the columns of `ShardWriter.finish`, `read`, or of an index of the first layout."""
        self._columns = columns
        # Sources without shards and indexes of the first layout have all three numbers of a place.
        self._place_width = len(columns["places"]) // max(len(self), 1)

    def __len__(self) -> int:
        return len(self._columns["sizes"])

    def key(self, i: int) -> str:
        """Name of record i, without the name of the shard."""
        return self._text("keys", *self._span("key_ends", i))

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of record i, at least one."""
        first, last = self._span("caption_ends", i)
        return tuple(self._text("texts", *self._span("text_ends", k)) for k in range(first, last))

    def kinds(self, i: int) -> tuple[int, ...]:
        """The number in `data.captions` of each caption of record i; (): it is not set."""
        if not len(self._columns.get("kinds", ())):
            return ()
        first, last = self._span("caption_ends", i)
        return tuple(self._columns["kinds"][first:last].tolist())

    def size(self, i: int) -> int:
        """Bytes of the encoded image of record i."""
        return int(self._columns["sizes"][i])

    def place(self, i: int) -> list[int]:
        """Place of the image of record i: two numbers, or the three of its reader."""
        width = self._place_width
        return self._columns["places"][width * i : width * (i + 1)].tolist()

    def hashes(self) -> np.ndarray:
        """Hashes of all captions in order, S16 as in the embedding store."""
        return self._columns["hashes"].view(f"S{HASH_BYTES}")

    def caption_counts(self) -> np.ndarray:
        """Number of captions of every record."""
        return np.diff(self._columns["caption_ends"].astype(np.int64), prepend=0)

    def column(self, name: str) -> np.ndarray | list[str | None]:
        """The values of a field of every record: float64, NaN where it is missing, or texts."""
        if name in BUILT_IN:
            return BUILT_IN[name](self._columns).astype(np.float64)
        values = self._columns[FIELD + name]
        ends = self._columns.get(f"{FIELD}{name}.ends")
        if ends is None:
            return values
        content, starts = values.tobytes(), [0, *ends.tolist()]
        texts = [
            content[a:b].decode("utf-8", "surrogatepass")
            for a, b in zip(starts[:-1], starts[1:], strict=True)
        ]
        # A missing text is one NUL: a caption or a licence never is.
        return [None if text == "\0" else text for text in texts]

    def _span(self, name: str, i: int) -> tuple[int, int]:
        ends = self._columns[name]
        return (int(ends[i - 1]) if i else 0), int(ends[i])

    def _text(self, name: str, start: int, end: int) -> str:
        return self._columns[name][start:end].tobytes().decode("utf-8", "surrogatepass")


# Fields that every source has.
BUILT_IN = {
    "width": lambda columns: columns["image_sizes"][0::2],
    "height": lambda columns: columns["image_sizes"][1::2],
    "bytes": lambda columns: columns["sizes"],
}


def write(path: pathlib.Path, columns: Mapping[str, np.ndarray], report: Mapping[str, Any]) -> None:
    """Writes a shard's file, whole or not at all."""
    text = json.dumps(report, ensure_ascii=True, sort_keys=True)
    with atomic.file(path) as temporary:
        save_file(dict(columns), temporary, metadata={_REPORT: text})


def read(path: pathlib.Path) -> Shard:
    """Memory-maps a file of `write`."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = 8 + length
    columns = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            count = (last - first) // dtype.itemsize
            columns[name] = np.frombuffer(content, dtype, count, start + first)
    return Shard(columns)


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """The report in a file of `write`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return json.loads(header["__metadata__"][_REPORT])


def row_bytes(key: str, size: int, captions: Sequence[str]) -> bytes:
    """What a record adds to the hash of an index."""
    return json.dumps([key, size, *captions]).encode()


def _field_columns(name: str, values: Sequence[Field]) -> dict[str, np.ndarray]:
    """A column of numbers, NaN where one is missing; or of texts, if any value is one."""
    if not any(isinstance(value, str) for value in values):
        numbers = [np.nan if value is None else float(value) for value in values]
        return {name: np.array(numbers, "<f8")}
    texts = [_encoded("\0" if value is None else str(value)) for value in values]
    ends = np.cumsum([len(text) for text in texts], dtype="<u4")
    return {name: np.frombuffer(b"".join(texts), np.uint8), f"{name}.ends": ends.astype("<u4")}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
