"""TFRecord files of serialised `tf.train.Example`s, without TensorFlow.

One pass over the files checks both checksums of every record and stores the offset of its image;
each later read is one `pread`. The framing is length (u64), its checksum (u32), data, checksum
(u32); of an Example only the byte lists are read.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Caption, Item, texts_of
from imagen_jax.data.sources.sample_fields import SampleFields

CHECKED = 100  # Records without a feature after which its name is an error.
MAX_RECORD_BYTES = 1 << 30  # Read at once; an image has some megabytes.


class TFRecords:
    """Reader of TFRecord files; see `records.Reader`."""

    def __init__(
        self, source: SourceConfig, shards: Mapping[pathlib.Path, int] | None = None
    ) -> None:
        """Finds the files.

        Args:
          source: path, image_key, caption_key.
          shards: the files with their number of records; None: the files of `source.path`, of any
            length.
        """
        paths = (
            files.find(source.path, [".tfrecord", ".tfrecords"]) if shards is None else [*shards]
        )
        self._source, self._shards = source, shards
        self._files, self.shards = files.Files(paths), paths
        self._names = files.names(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.image_key, source.caption_key]

    def scan(self) -> Iterator[Item]:
        """Lists the records in the order of the files.

        Raises:
          ConfigError: a missing feature; with `shards` also a truncated file.
        """
        for number in range(len(self.shards)):
            yield from self.scan_shard(number)

    def scan_shard(self, number: int) -> Iterator[Item]:
        """Lists the records of a file. Raises ConfigError: see `scan`."""
        if number == 0:
            check_names(FeatureNames(self._source), self._first())
        names, name = FeatureNames(self._source), self._names[number]
        path = self._files.local(number)
        count = 0
        try:
            for frame in read_frames(path):
                yield _item(f"{name}__{count}", number, frame, names)
                count += 1
        except TruncatedError as error:
            if self._shards is not None:
                raise
            yield Item(name, fault=f"truncated (only {count} records are used: {error})")
        expected = self._shards[self.shards[number]] if self._shards else count
        if count != expected:
            raise ConfigError(f"{path} holds {count} records, expected {expected}; copy it again")

    def _first(self) -> Iterator[memoryview]:
        """The records of all files, up to the first damage of each."""
        for number in range(len(self.shards)):
            with contextlib.suppress(TruncatedError):
                frames = read_frames(self._files.local(number))
                yield from (frame.payload for frame in frames if frame.intact)

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of the image at `location`, and its size."""
        return self._files.read_start(location, count)

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes."""
        del key
        return self._files.read(*location)


class Frame(NamedTuple):
    """A record: offset of its data in the file, the data, and whether these have their checksum."""

    start: int
    payload: memoryview
    intact: bool


def _item(key: str, number: int, frame: Frame, names: FeatureNames) -> Item:
    """The record `key` in file `number`."""
    if not frame.intact:
        return Item(key, fault="damaged record (checksum)")
    try:
        (first, last), captions = names.find(frame.payload)
    except ExampleError as error:
        return Item(key, fault=f"damaged record ({error})")
    item = Item(key, captions, (number, frame.start + first, last - first))
    return names.metadata.add(item, parse_values(frame.payload, names.metadata.names))


class TruncatedError(ConfigError):
    """A file ends within a record, or is not a TFRecord file."""


class ExampleError(ValueError):
    """Data are no serialised `tf.train.Example`."""


class FeatureNames:
    """Finds the image, the captions and the metadata in Examples.

    A record without a feature is rejected; if no record has it, the configuration is wrong.
    """

    def __init__(self, source: SourceConfig) -> None:
        """Takes the feature names from `source.image_key` and `source.caption_key`."""
        self._source = source
        self._feature_names = {"image_key": source.image_key, "caption_key": source.caption_key}
        if source.captions:  # They replace the key.
            del self._feature_names["caption_key"]
        self.metadata = SampleFields(source)
        self._seen: set[str] = set()
        self._count = 0

    def find(self, payload: memoryview) -> tuple[tuple[int, int], tuple[Caption, ...]]:
        """Span of the image in an Example ((0, 0): no image), and the captions."""
        features = parse_example(payload)
        self._seen |= features.keys()
        self._count += 1
        spans = features.get(self._source.caption_key, ())
        texts = texts_of([bytes(payload[a:b]) for a, b in spans])
        return (features.get(self._source.image_key) or [(0, 0)])[0], texts

    def check(self) -> None:
        """Raises ConfigError when no record had one of the features."""
        for field, name in self._feature_names.items():
            if self._count and name not in self._seen:
                raise ConfigError(unknown_name(f"config.data.{field}", name, sorted(self._seen)))


def check_names(names: FeatureNames, payloads: Iterable[memoryview]) -> None:
    """Checks that some of the first records has each feature. Raises ConfigError."""
    for payload in itertools.islice(payloads, CHECKED):
        with contextlib.suppress(ExampleError):
            names.find(payload)
    names.check()


def read_frames(path: pathlib.Path) -> Iterator[Frame]:
    """Yields every record of a TFRecord file.

    Raises:
      TruncatedError: the file ends within a record, does not begin with one, or has a wrong
        checksum of a length, after which no record can be found.
    """
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset < size:
            header = file.read(12)
            length, checksum = struct.unpack("<QI", header) if len(header) == 12 else (size, 0)
            whole = offset + 16 + length <= size and length <= MAX_RECORD_BYTES
            if not whole or checksum != masked_crc(header[:8]):
                raise TruncatedError(
                    f"{path} is truncated or damaged at byte {offset} of {size} or is no TFRecord "
                    "file; copy it again, or decompress it"
                )
            payload = file.read(length)
            (checksum,) = struct.unpack("<I", file.read(4))
            yield Frame(offset + 12, memoryview(payload), checksum == masked_crc(payload))
            offset += 16 + length


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated and shifted (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(payload: memoryview) -> dict[str, list[tuple[int, int]]]:
    """Byte-list features of a serialised `tf.train.Example`: name -> (start, end) of each value.

    Protocol-buffer path: Example.features(1) . feature(1, a map: key 1, value 2) . bytes_list(1) .
    value(1). A feature of another type or without a value maps to an empty list.

    Raises:
      ExampleError: the data are not a message of this kind.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for features in _fields(payload, (0, len(payload)), 1):
        for item in _fields(payload, features, 1):
            name = "".join(
                str(payload[a:b], "utf-8", "replace") for a, b in _fields(payload, item, 1)
            )
            found[name] = [
                value
                for feature in _fields(payload, item, 2)
                for values in _fields(payload, feature, 1)
                for value in _fields(payload, values, 1)
            ]
    return found


def parse_values(payload: memoryview, names: Sequence[str]) -> dict[str, list[Any]]:
    """Values of some features of a serialised `tf.train.Example`: bytes, float or int.

    Feature: bytes_list(1), float_list(2), int64_list(3), each with value(1), numbers packed.
    """
    found: dict[str, list[Any]] = {}
    for features in _fields(payload, (0, len(payload)), 1) if names else ():
        for item in _fields(payload, features, 1):
            name = "".join(
                str(payload[a:b], "utf-8", "replace") for a, b in _fields(payload, item, 1)
            )
            if name in names:
                found[name] = [
                    value
                    for feature in _fields(payload, item, 2)
                    for number, read in _VALUES.items()
                    for values in _fields(payload, feature, number)
                    for value in read(payload, values)
                ]
    return found


def _bytes_values(data: memoryview, span: tuple[int, int]) -> list[bytes]:
    return [bytes(data[a:b]) for a, b in _fields(data, span, 1)]


def _float_values(data: memoryview, span: tuple[int, int]) -> list[float]:
    return [
        value
        for a, b in _fields(data, span, 1)
        for value in struct.unpack(f"<{(b - a) // 4}f", data[a : a + (b - a) // 4 * 4])
    ]


def _int_values(data: memoryview, span: tuple[int, int]) -> list[int]:
    found = []
    for at, end in _fields(data, span, 1):
        while at < end:
            value, at = _varint(data, at)
            found.append(value - (1 << 64) if value >> 63 else value)
    return found


_VALUES = {1: _bytes_values, 2: _float_values, 3: _int_values}


def _fields(
    data: memoryview, span: tuple[int, int], field_number: int
) -> Iterator[tuple[int, int]]:
    """Spans of the length-delimited fields `field_number` of the message at `span`."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > end:
                raise ExampleError("a field ends beyond its message")
            if tag >> 3 == field_number:
                yield at, at + length
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ExampleError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70 and at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ExampleError("an endless number")
