"""TFRecord files of serialised `tf.train.Example`s, without TensorFlow.

One pass over the files notes where every picture lies; afterwards a picture is a `pread`. The
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
    """TFRecord files as a kind of source; see `records.Reader`."""

    def __init__(
        self, source: SourceConfig, shards: Mapping[pathlib.Path, int] | None = None
    ) -> None:
        """Finds the files.

        Args:
          source: path, image_key, caption_key.
          shards: the files, each with the number of records it must hold; None: those of
            `source.path`, of any length.
        """
        paths = (
            files.find(source.path, [".tfrecord", ".tfrecords"]) if shards is None else [*shards]
        )
        self._source, self._shards = source, shards
        self._files = files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.image_key, source.caption_key]

    def scan(self) -> Iterator[Item]:
        """The records in the order of the files.

        Raises:
          ConfigError: an absent feature; with known lengths also a file that is cut short.
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

    def read(self, key: str, place: Location) -> bytes:
        """The picture at `place`: file, offset, bytes."""
        del key
        return self._files.read(*place)


class TruncatedError(ConfigError):
    """A file ends within a record, or is no TFRecord file at all."""


class FeatureNames:
    """Finds the picture and the captions of one Example after the other.

    A record may lack a feature, which is its own fault; if all do, the configuration is wrong.
    """

    CHECK_AFTER = 100  # Records after which an absent feature is taken for a wrong name.

    def __init__(self, source: SourceConfig) -> None:
        """Looks for `source.image_key` and `source.caption_key`."""
        self._wanted = {"image_key": source.image_key, "caption_key": source.caption_key}
        self._seen: set[str] = set()
        self._count = 0

    def find(self, payload: memoryview) -> tuple[tuple[int, int], tuple[str, ...]]:
        """Where in an Example its picture lies ((0, 0): there is none), and its captions."""
        features = parse_example(payload)
        self._seen |= features.keys()
        self._count += 1
        if self._count == self.CHECK_AFTER:
            self.check()
        spans = features.get(self._wanted["caption_key"], ())
        texts = tuple(str(payload[a:b], "utf-8", "replace") for a, b in spans)
        return (features.get(self._wanted["image_key"]) or [(0, 0)])[0], texts

    def check(self) -> None:
        """Raises ConfigError when one of the features was in none of the records."""
        for field, name in self._wanted.items():
            if self._count and name not in self._seen:
                raise ConfigError(unknown_name(f"config.data.{field}", name, sorted(self._seen)))


def read_frames(path: pathlib.Path) -> Iterator[tuple[int, memoryview]]:
    """Yields (offset of the data in the file, data) of every record of a TFRecord file.

    Raises:
      TruncatedError: the file ends within a record, or begins with none.
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
    value(1). A feature of another type, or with no value, maps to an empty list.
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


def _fields(data: memoryview, span: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Spans of the length-delimited fields numbered `wanted` of the message at `span`."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            if tag >> 3 == wanted:
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
