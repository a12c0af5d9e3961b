"""Finds and reads the files of a prepared TFDS data set without TFDS.

`dataset_info.json` in the folder of a builder lists the files of each split. TFRecord files are
read by tfrecord.py; ArrayRecord files, which need the package `array_record`, by this module.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from imagen_jax.config import plugins
from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Item, Reader
from imagen_jax.data.sources.tfrecord import (
    FeatureNames,
    TFRecords,
    check_names,
    parse_values,
)
from imagen_jax.io import mirrors

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default file names.


def open_tfds(source: SourceConfig) -> Reader:
    """Opens the files of `source.split`; builds a missing data set first.

    Raises:
      ConfigError: no such data set, split or file.
    """
    folder = find(source)
    file_format, paths = shards(folder, source.split)
    reader = FORMATS[file_format](source, paths)
    reader.cache = folder / files.CACHE / source.split
    return reader


class DatasetName(NamedTuple):
    """The parts of `config.data.name`: BUILDER, BUILDER/CONFIG, either with :VERSION.

    Attributes:
      builder: TFDS name, entry point, or package.module:ClassName.
      config: "" for the only configuration.
      version: such as 1.0.0; "" for the newest.
    """

    builder: str
    config: str
    version: str

    @property
    def folder(self) -> str:
        """Folder of the builder in the data_dir: its TFDS name, of a class in snake case."""
        if not plugins.is_path(self.builder):
            return self.builder
        class_name = re.split(r"[:.]", self.builder)[-1]
        # tfds.core.naming.camelcase_to_snakecase.
        words = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", class_name)
        return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", words).lower()


def parse_name(name: str) -> DatasetName:
    """Splits `config.data.name`. Raises ConfigError: it is empty."""
    if not name:
        raise ConfigError(
            "config.data.name is empty, but config.data.kind='tfds' needs a data set: "
            "BUILDER[/CONFIG][:VERSION], for example coco_captions/2014"
        )
    path, version = name, ""
    if re.search(r":\d+\.\d+\.\d+$", name):
        path, _, version = name.rpartition(":")
    builder, _, config = path.partition("/")
    return DatasetName(builder, config, version)


def find(source: SourceConfig) -> pathlib.Path:
    """The folder of the newest, or the given, version; builds a missing data set.

    Args:
      source: `path` is the data_dir, `name` as in `DatasetName`.

    Raises:
      ConfigError: no data set of that name in the folder, and it cannot be built.
    """
    name = parse_name(source.name)
    address = mirrors.origin(source.path)
    # The mirror of a bucket is that of the builder alone: the data_dir may hold many.
    parent = pathlib.Path(source.path, "" if address else name.folder, name.config)
    folder = _newest(parent, name.version)
    if folder is None and address:
        raise ConfigError(
            f"config.data.path={source.path!r} holds no {source.name!r}; prepare it on a disk and "
            "copy it there"
        )
    if folder is None:
        try:
            from imagen_jax.data.sources import tfds_build
        except ImportError as error:
            raise ConfigError(
                f"config.data.path={source.path!r} holds no {source.name!r}, and building it needs "
                f"the module {error.name!r}; install tensorflow and tensorflow-datasets, or copy "
                "the prepared data set there"
            ) from None
        tfds_build.prepare(source.path, "/".join(filter(None, name[:2])))
        folder = _newest(parent, name.version)
    if folder is None:
        raise ConfigError(f"config.data.name={source.name!r} is not in {source.path!r}")
    return folder


def _newest(folder: pathlib.Path, version: str) -> pathlib.Path | None:
    """The folder of a version; the configuration may be omitted if there is only one.

    Raises:
      ConfigError: several configurations.
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
    """The format of a split, and its files in order with their number of records.

    Raises:
      ConfigError: no such split, a missing file, or an unsupported format.
    """
    info = json.loads(mirrors.read_bytes(folder / "dataset_info.json"))
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
    """Reader of ArrayRecord files of Examples; see `records.Reader`."""

    cache: pathlib.Path  # Set by `open_tfds`.

    def __init__(self, source: SourceConfig, shards: Mapping[pathlib.Path, int]) -> None:
        """Opens the files. Raises ConfigError: no array_record, or the files are in a bucket."""
        if address := mirrors.origin(next(iter(shards))):
            raise ConfigError(
                f"{address} is an array_record, which is read from a disk alone; prepare the data "
                "set with file_format='tfrecord'"
            )
        try:
            module = importlib.import_module("array_record.python.array_record_module")
        except ImportError as error:
            raise ConfigError(
                f"{next(iter(shards)).parent} is stored as array_record, which needs the module "
                f"{error.name!r}; install array_record"
            ) from None
        paths = [*shards]
        self._source, self.shards, self._names = source, paths, files.names(paths)
        self._readers = [module.ArrayRecordReader(str(path)) for path in paths]
        self._lock = threading.Lock()
        self.identity = [files.stats(paths), source.image_key, source.caption_key]

    def scan(self) -> Iterator[Item]:
        """Lists the records in the order of the files. Raises ConfigError: a missing feature."""
        for number in range(len(self.shards)):
            yield from self.scan_shard(number)

    def scan_shard(self, number: int) -> Iterator[Item]:
        """Lists the records of a file. Raises ConfigError: a missing feature."""
        names = FeatureNames(self._source)
        if number == 0:
            every = ((n, i) for n, r in enumerate(self._readers) for i in range(r.num_records()))
            check_names(FeatureNames(self._source), (self._example(*at) for at in every))
        for index in range(self._readers[number].num_records()):
            payload = self._example(number, index)
            (first, last), captions = names.find(payload)
            # File number, record number, and offset and size of the image in the record.
            location = (number, index, (first << 32) + last - first)
            item = Item(f"{self._names[number]}__{index}", captions, location)
            yield names.metadata.add(item, parse_values(payload, names.metadata.names))

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, record number, offset and size in the record."""
        del key
        number, index, span = location
        first, size = span >> 32, span & 0xFFFFFFFF
        return bytes(self._example(number, index)[first : first + size])

    def _example(self, number: int, index: int) -> memoryview:
        with self._lock:  # Readers are not thread-safe.
            return memoryview(self._readers[number].read([index])[0])


FORMATS = {"tfrecord": TFRecords, "array_record": ArrayRecords}
