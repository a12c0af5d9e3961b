"""The files of a prepared TFDS data set, found and read without TFDS.

A builder's folder says in `dataset_info.json` which files hold which split. TFRecord files are read
by tfrecord.py; ArrayRecord files, which need the package `array_record`, here.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import threading
from collections.abc import Iterator, Mapping

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Item, Reader
from imagen_jax.data.sources.tfrecord import FeatureNames, TFRecords

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's usual file names.


def open_tfds(source: SourceConfig) -> Reader:
    """The files of `source.split` as a kind of source; built first if they are not there.

    Raises:
      ConfigError: no such data set, split or file.
    """
    folder = find(source)
    file_format, paths = shards(folder, source.split)
    reader = FORMATS[file_format](source, paths)
    reader.cache = folder / files.CACHE / source.split
    return reader


def find(source: SourceConfig) -> pathlib.Path:
    """The folder of the newest (or the named) version; the data set is built if it is not there.

    Args:
      source: `path` is the data_dir, `name` is BUILDER or BUILDER/CONFIG, with :VERSION or without.

    Raises:
      ConfigError: it is not there and cannot be built.
    """
    name, _, version = source.name.partition(":")
    folder = _newest(pathlib.Path(source.path) / name, version)
    if folder is None:
        try:
            builder = importlib.import_module("imagen_jax.worlds.shapes.builder")
        except ImportError as error:
            raise ConfigError(
                f"config.data.path={source.path!r} holds no {source.name!r}, and building it needs "
                f"the module {error.name!r}; install tensorflow and tensorflow-datasets, or copy "
                "the prepared data set there"
            ) from None
        builder.prepare(source.path, name)
        folder = _newest(pathlib.Path(source.path) / name, version)
    if folder is None:
        raise ConfigError(f"config.data.name={source.name!r} is not in {source.path!r}")
    return folder


def _newest(folder: pathlib.Path, version: str) -> pathlib.Path | None:
    """The version's folder; of a builder with one configuration, also without its name.

    Raises:
      ConfigError: there are several configurations.
    """
    found = _versions(folder, version)
    if not found and folder.is_dir():
        configs = {p.name: _versions(p, version) for p in sorted(folder.iterdir())}
        configs = {name: versions for name, versions in configs.items() if versions}
        if len(configs) > 1:
            raise ConfigError(
                f"{folder} holds several configurations; set config.data.name to one of "
                + ", ".join(f"{folder.name}/{name}" for name in configs)
            )
        found = next(iter(configs.values()), [])
    return max(found, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _versions(folder: pathlib.Path, version: str) -> list[pathlib.Path]:
    infos = [p.parent for p in folder.glob("*/dataset_info.json")]
    numbered = [p for p in infos if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    return [p for p in numbered if version in ("", p.name)]


def shards(folder: pathlib.Path, split: str) -> tuple[str, dict[pathlib.Path, int]]:
    """The format and files of a split in order, each with the number of records it must hold.

    Raises:
      ConfigError: no such split, a missing file, or a format that is not read.
    """
    info = json.loads((folder / "dataset_info.json").read_text())
    file_format = info.get("fileFormat", "tfrecord")
    if file_format not in FORMATS:
        raise ConfigError(
            f"{folder} is stored as {file_format}; prepare it with file_format='tfrecord'"
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
            FILEFORMAT=file_format,
            SHARD_INDEX=shard,
            NUM_SHARDS=count,
            SHARD_X_OF_Y=f"{shard}-of-{count}",
        )
        if not path.is_file():
            raise ConfigError(f"{path} is missing; prepare or copy the data set again")
        found[path] = length
    return file_format, found


class ArrayRecords:
    """ArrayRecord files of Examples as a kind of source; see `records.Reader`."""

    cache: pathlib.Path  # Set by `open_tfds`.

    def __init__(self, source: SourceConfig, shards: Mapping[pathlib.Path, int]) -> None:
        """Raises ConfigError when the package is not there."""
        try:
            module = importlib.import_module("array_record.python.array_record_module")
        except ImportError as error:
            raise ConfigError(
                f"{next(iter(shards)).parent} is stored as array_record, which needs the module "
                f"{error.name!r}; install array_record"
            ) from None
        paths = [*shards]
        self._source, self._names = source, files.names(paths)
        self._readers = [module.ArrayRecordReader(str(path)) for path in paths]
        self._lock = threading.Lock()
        self.identity = [files.stats(paths), source.image_key, source.caption_key]

    def scan(self) -> Iterator[Item]:
        """The records in the order of the files. Raises ConfigError for an absent feature."""
        names = FeatureNames(self._source)
        for number, (name, reader) in enumerate(zip(self._names, self._readers, strict=True)):
            for index in range(reader.num_records()):
                (first, last), captions = names.find(self._example(number, index))
                # A record is unpacked as a whole: its number, and where in it the picture ends.
                place = (number, index, (first << 32) + last - first)
                yield Item(f"{name}__{index}", captions, place)
        names.check()

    def read(self, key: str, place: Location) -> bytes:
        """The picture at `place`: file, record, offset and bytes within the record."""
        del key
        number, index, span = place
        first, size = span >> 32, span & 0xFFFFFFFF
        return bytes(self._example(number, index)[first : first + size])

    def _example(self, number: int, index: int) -> memoryview:
        with self._lock:  # A reader has one position.
            return memoryview(self._readers[number].read([index])[0])


FORMATS = {"tfrecord": TFRecords, "array_record": ArrayRecords}
