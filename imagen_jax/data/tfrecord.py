"""The TFRecord files of a prepared TFDS data set as index entries, without TensorFlow.

One pass over the files notes where every picture lies; afterwards record i is a `pread`. The
framing is length (u64), its checksum (u32), data, checksum (u32); the data is a `tf.train.Example`,
of which only the byte lists are read.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import struct
from collections.abc import Iterator

from imagen_jax import images
from imagen_jax.config import ConfigError, DataConfig, unknown_name
from imagen_jax.data.records import Entry, Quarantine, caption_fault, clean, size_fault

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's usual file names.


def find(data: DataConfig) -> pathlib.Path:
    """The folder of the newest (or the named) version; the data set is built if it is not there.

    Args:
      data: `path` is the data_dir, `name` is BUILDER or BUILDER:VERSION.

    Raises:
      ConfigError: it is not there and cannot be built.
    """
    name, _, version = data.name.partition(":")
    folder = _newest(pathlib.Path(data.path) / name, version)
    if folder is None:
        try:
            builder = importlib.import_module("imagen_jax.data.shapes_builder")
        except ImportError as error:
            raise ConfigError(
                f"config.data.path={data.path!r} holds no {data.name!r}, and building it needs "
                f"the module {error.name!r}; install tensorflow and tensorflow-datasets, or copy "
                "the prepared data set there"
            ) from None
        builder.prepare(data.path, name)
        folder = _newest(pathlib.Path(data.path) / name, version)
    if folder is None:
        raise ConfigError(f"config.data.name={data.name!r} is not in {data.path!r}")
    return folder


def _newest(folder: pathlib.Path, version: str) -> pathlib.Path | None:
    infos = [p.parent for p in folder.glob("*/dataset_info.json")]
    numbered = [p for p in infos if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    if version:
        numbered = [p for p in numbered if p.name == version]
    return max(numbered, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def shards(folder: pathlib.Path, split: str) -> dict[pathlib.Path, int]:
    """The files of a split in order, each with the number of records it must hold.

    Raises:
      ConfigError: no such split, a missing file, or a format other than TFRecord.
    """
    info = json.loads((folder / "dataset_info.json").read_text())
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ConfigError(
            f"{folder} is stored as {info['fileFormat']}; prepare it with file_format='tfrecord'"
        )
    splits = {s["name"]: s for s in info["splits"]}
    if split not in splits:
        raise ConfigError(unknown_name("config.data.split", split, list(splits)))
    lengths = [int(n) for n in splits[split].get("shardLengths", ())]
    template = splits[split].get("filepathTemplate") or TEMPLATE
    found = {}
    for number, length in enumerate(lengths):
        shard, count = f"{number:05d}", f"{len(lengths):05d}"
        path = folder / template.format(
            DATASET=info["name"],
            SPLIT=split,
            FILEFORMAT="tfrecord",
            SHARD_INDEX=shard,
            NUM_SHARDS=count,
            SHARD_X_OF_Y=f"{shard}-of-{count}",
        )
        if not path.is_file():
            raise ConfigError(f"{path} is missing; prepare or copy the data set again")
        found[path] = length
    return found


def index(
    files: dict[pathlib.Path, int], data: DataConfig, *, min_size: int, report: Quarantine
) -> list[Entry]:
    """Reads every record once: captions, and where its picture lies (`place`: file, offset, size).

    Of a picture only the header is looked at; damage further in shows when it is read.

    Raises:
      ConfigError: a truncated file or an absent feature.
    """
    entries = []
    for number, (path, expected) in enumerate(files.items()):
        records = 0
        for start, payload in read_frames(path):
            key, records = f"{path.name}__{records}", records + 1
            features = parse_example(payload)
            for name in (data.image_key, data.caption_key):
                if name not in features:
                    field = "image_key" if name == data.image_key else "caption_key"
                    raise ConfigError(unknown_name(f"config.data.{field}", name, list(features)))
            texts = tuple(str(payload[a:b], "utf-8") for a, b in features[data.caption_key])
            first, last = (features[data.image_key] or [(0, 0)])[0]
            fault = caption_fault(texts) or _header_fault(payload[first:last], min_size)
            if fault:
                report.add(key, fault)
            else:
                place = (number, start + first, last - first)
                entries.append(Entry(key, clean(texts), last - first, place))
        if records != expected:
            raise ConfigError(f"{path} holds {records} records, expected {expected}; copy it again")
    report.total = len(entries) + len(report.rejected)
    return entries


def _header_fault(picture: memoryview, min_size: int) -> str | None:
    try:
        return size_fault(min(images.size_of(bytes(picture))), min_size)
    except images.PictureError as error:
        return str(error)


def read_frames(path: pathlib.Path) -> Iterator[tuple[int, memoryview]]:
    """Yields (offset of the data in the file, data) of every record of a TFRecord file.

    Raises:
      ConfigError: the file ends within a record.
    """
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset < size:
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if offset + 16 + length > size:
                raise ConfigError(f"{path} is truncated at byte {offset} of {size}; copy it again")
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
