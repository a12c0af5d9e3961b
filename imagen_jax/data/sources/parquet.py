"""Parquet files with encoded images and captions in columns.

The image column holds bytes or Hugging Face's struct with a field `bytes`; the caption column holds
strings or lists of strings. In an uncompressed column the index pass finds the offset of every
image, and a read is one `pread` (compression saves nothing on encoded images). A compressed column
has no random access: a read decompresses the whole row group. The last row groups are cached, which
helps sequential reads only; a shuffled read decompresses one row group per image, and the report
notes its size. In a bucket it copies the whole file first: store images uncompressed there.
"""

from __future__ import annotations

import collections
import importlib
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Item, texts_of
from imagen_jax.data.sources.sample_fields import SampleFields
from imagen_jax.io.images import ImageError

MAX_CACHED_BYTES = 512 << 20  # Of decompressed row groups; the last one is always kept.
# Bytes; decompressing a larger row group takes longer than decoding the image.
LARGE_ROW_GROUP_BYTES = 4 << 20


# pyarrow's own errors are OSErrors, ValueErrors, KeyErrors and NotImplementedErrors.
_DAMAGED = (OSError, ValueError, LookupError, NotImplementedError, MemoryError, OverflowError)


class ParquetReader:
    """Reader of Parquet files; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError: no files, or pyarrow is not installed."""
        try:
            self._pq = importlib.import_module("pyarrow.parquet")
            self._compute = importlib.import_module("pyarrow.compute")
        except ImportError as error:
            raise ConfigError(
                f"config.data.kind='parquet' needs the module {error.name!r}; install pyarrow"
            ) from None
        paths = files.find(source.path, [".parquet"])
        self._source, self._files, self.shards = source, files.Files(paths), paths
        self._names, self._metadata = files.names(paths), SampleFields(source)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.image_key, source.caption_key]
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Item]:
        """Lists the rows in the order of the files. Raises ConfigError: a missing column."""
        for number in range(len(self.shards)):
            yield from self.scan_shard(number)

    def scan_shard(self, number: int) -> Iterator[Item]:
        """Lists the rows of a file. Raises ConfigError: a missing column."""
        name, path = self._names[number], self._files.local(number)
        try:
            table = self._open(path)
        except _DAMAGED as error:
            yield Item(name, fault=f"unreadable ({' '.join(str(error).split())})")
            return
        self._check_columns(table.schema_arrow.names)
        row = 0
        for group in range(table.num_row_groups):
            try:
                items = list(self._group_items(table, number, group))
            except ConfigError:
                raise
            except _DAMAGED as error:
                why = " ".join(str(error).split())
                yield Item(f"{name}__{row}", fault=f"unreadable row group ({why})")
                continue
            for item in items:
                yield item._replace(key=f"{name}__{row}")
                row += 1

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of the image at `location`, and its size."""
        if location[1] >= 0:
            return self._files.read_start(location, count)
        data = self.read(key, location)
        return data, len(data)

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes; or file number, -1 - group, row."""
        del key
        number, offset, size_or_row = location
        if offset >= 0:
            return self._files.read(number, offset, size_or_row)
        try:
            return self._group(number, -1 - offset)[size_or_row].as_py()
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # Of the file system; pyarrow's own have no number.
            raise ImageError(f"unreadable row group ({' '.join(str(error).split())})") from error

    def _check_columns(self, names: list[str]) -> None:
        for field in ("image_key",) if self._source.captions else ("image_key", "caption_key"):
            name = getattr(self._source, field)
            if name not in names:
                raise ConfigError(unknown_name(f"config.data.{field}", name, names))

    def _group_items(self, table: Any, number: int, group: int) -> Iterator[Item]:
        """The rows of a row group with empty keys."""
        names = table.schema_arrow.names
        images = self._group(number, group)
        captions = [None] * len(images)
        if self._source.caption_key in names:
            column = table.read_row_group(group, columns=[self._source.caption_key])[0]
            captions = self._texts(column)
        present = [name for name in self._metadata.names if name in names]
        columns = [self._texts(table.read_row_group(group, columns=[name])[0]) for name in present]
        chunk = self._raw_chunk(table, number, group)
        notes = ()
        if chunk is None and images.nbytes > LARGE_ROW_GROUP_BYTES:
            size = f"{images.nbytes / 2**20:.0f} MB are decompressed for each image"
            notes = (f"compressed row group ({size}; write it with compression='none')",)
        at = 0
        for row, (value, texts) in enumerate(zip(images, captions, strict=True)):
            location = (number, -1 - group, row)
            metadata = {name: values[row] for name, values in zip(present, columns, strict=True)}
            if not value.is_valid:
                yield Item("", texts_of(texts), fault="no image")
                continue
            if chunk is not None:
                data = value.as_py()
                found = chunk[1].find(data, at)
                # Equal images may be stored once; then search from the start.
                found = chunk[1].find(data) if found < 0 else found
                if found >= 0:
                    location, at = (number, chunk[0] + found, len(data)), found + len(data)
                else:  # An encoding that does not store values contiguously.
                    chunk = None
            item = Item("", texts_of(texts), location, notes=notes)
            yield self._metadata.add(item, metadata)

    def _open(self, path: pathlib.Path) -> Any:
        """Opens a file so that a value that its dictionary repeats is decoded once.

        A file of some kilobytes can repeat an image a million times.
        """
        schema = self._pq.read_metadata(path).schema
        columns = [schema.column(i) for i in range(len(schema))]
        values = [c for c in columns if c.physical_type == "BYTE_ARRAY"]
        names = [c.path for c in values if not c.max_repetition_level]  # No lists.
        return self._pq.ParquetFile(path, read_dictionary=names)

    def _texts(self, column: Any) -> list[Any]:
        """The values of the caption column; texts that are not UTF-8 as bytes."""
        found: list[Any] = []
        for chunk in column.chunks:
            if hasattr(chunk, "dictionary"):
                values = self._values(chunk.dictionary)
                found += [None if at is None else values[at] for at in chunk.indices.to_pylist()]
            else:
                found += self._values(chunk)
        return found

    def _values(self, column: Any) -> list[Any]:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            arrow, kind = importlib.import_module("pyarrow"), column.type
            if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
                return column.cast(arrow.list_(arrow.large_binary())).to_pylist()
            return column.cast(arrow.large_binary()).to_pylist()

    def _raw_chunk(self, table: Any, number: int, group: int) -> tuple[int, bytes] | None:
        """Offset and bytes of the image column in a row group; None: it is compressed."""
        columns = table.metadata.row_group(group)
        for index in range(columns.num_columns):
            column = columns.column(index)
            key = self._source.image_key
            if column.path_in_schema in (key, f"{key}.bytes"):
                if column.compression != "UNCOMPRESSED":
                    return None
                start = column.data_page_offset
                if column.dictionary_page_offset is not None:
                    start = min(start, column.dictionary_page_offset)
                return start, self._files.read(number, start, column.total_compressed_size)
        return None

    def _group(self, number: int, group: int) -> Any:
        """The encoded images of a row group, a chunked Arrow array of bytes."""
        with self._lock:
            if (number, group) in self._groups:
                self._groups.move_to_end((number, group))
                return self._groups[number, group]
            table = self._open(self._files.local(number))
            images = table.read_row_group(group, columns=[self._source.image_key])[0]
            fields = getattr(images.type, "names", None)
            if fields:
                if "bytes" not in fields:
                    raise ConfigError(
                        f"config.data.image_key={self._source.image_key!r} is a struct of "
                        f"{', '.join(fields)}; one with a field 'bytes' is needed"
                    )
                images = self._compute.struct_field(images, "bytes")
            self._groups[number, group] = images
            while len(self._groups) > 1 and _size(self._groups) > MAX_CACHED_BYTES:
                self._groups.popitem(last=False)
            return images


def _size(groups: dict[tuple[int, int], Any]) -> int:
    return sum(images.nbytes for images in groups.values())
