"""TFRecord files of serialised `tf.train.Example`s, without TensorFlow.

One pass over the files stores the offset of every image; each later read is one `pread`. The
framing is length (u64), its checksum (u32), data, checksum (u32); of an Example only the byte lists
are read.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator, Mapping

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Item


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
        self._files = files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.image_key, source.caption_key]

    def scan(self) -> Iterator[Item]:
        """Lists the records in the order of the files.

        Raises:
          ConfigError: a missing feature; with `shards` also a truncated file.
        """
        names = FeatureNames(self._source)
        paths = self._files.paths
        for number, (path, name) in enumerate(zip(paths, files.names(paths), strict=True)):
            count = 0
            try:
                for start, payload in read_frames(path):
                    (first, last), captions = names.find(payload)
                    yield Item(f"{name}__{count}", captions, (number, start + first, last - first))
                    count += 1
            except TruncatedError as error:
                if self._shards is not None:
                    raise
                yield Item(name, fault=f"truncated (only {count} records are used: {error})")
            expected = self._shards[path] if self._shards else count
            if count != expected:
                raise ConfigError(
                    f"{path} holds {count} records, expected {expected}; copy it again"
                )
        names.check()

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes."""
        del key
        return self._files.read(*location)


class TruncatedError(ConfigError):
    """A file ends within a record, or is not a TFRecord file."""


class FeatureNames:
    """Finds the image and the captions in Examples.

    A record without a feature is rejected; if no record has it, the configuration is wrong.
    """

    CHECK_AFTER = 100  # Records without a feature after which its name is an error.

    def __init__(self, source: SourceConfig) -> None:
        """Takes the feature names from `source.image_key` and `source.caption_key`."""
        self._feature_names = {"image_key": source.image_key, "caption_key": source.caption_key}
        self._seen: set[str] = set()
        self._count = 0

    def find(self, payload: memoryview) -> tuple[tuple[int, int], tuple[str, ...]]:
        """Span of the image in an Example ((0, 0): no image), and the captions."""
        features = parse_example(payload)
        self._seen |= features.keys()
        self._count += 1
        if self._count == self.CHECK_AFTER:
            self.check()
        spans = features.get(self._feature_names["caption_key"], ())
        texts = tuple(str(payload[a:b], "utf-8", "replace") for a, b in spans)
        return (features.get(self._feature_names["image_key"]) or [(0, 0)])[0], texts

    def check(self) -> None:
        """Raises ConfigError when no record had one of the features."""
        for field, name in self._feature_names.items():
            if self._count and name not in self._seen:
                raise ConfigError(unknown_name(f"config.data.{field}", name, sorted(self._seen)))


def read_frames(path: pathlib.Path) -> Iterator[tuple[int, memoryview]]:
    """Yields (offset of the data in the file, data) of every record of a TFRecord file.

    Raises:
      TruncatedError: the file ends within a record, or does not begin with one.
    """
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset < size:
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if offset + 16 + length > size:
                raise TruncatedError(
                    f"{path} is truncated at byte {offset} of {size} or is no TFRecord file; "
                    "copy it again, or decompress it"
                )
            yield offset + 12, memoryview(file.read(length))
            file.seek(4, 1)
            offset += 16 + length


def parse_example(payload: memoryview) -> dict[str, list[tuple[int, int]]]:
    """Byte-list features of a serialised `tf.train.Example`: name -> (start, end) of each value.

    Protocol-buffer path: Example.features(1) . feature(1, a map: key 1, value 2) . bytes_list(1) .
    value(1). A feature of another type or without a value maps to an empty list.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for features in _fields(payload, (0, len(payload)), 1):
        for item in _fields(payload, features, 1):
            name = "".join(str(payload[a:b], "utf-8") for a, b in _fields(payload, item, 1))
            found[name] = [
                value
                for feature in _fields(payload, item, 2)
                for values in _fields(payload, feature, 1)
                for value in _fields(payload, values, 1)
            ]
    return found


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
            if tag >> 3 == field_number:
                yield at, at + length
            at += length
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
