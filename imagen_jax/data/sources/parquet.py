"""Parquet files with encoded pictures and captions in columns.

The picture column holds bytes or, as Hugging Face writes it, a struct with a field `bytes`; the
caption column text or lists of text. Where a picture's bytes stand in the file as they are (no
compression, which gains nothing on pictures), the index pass notes their offset and reading one is
a `pread`. Otherwise Parquet has no random access to a value: the whole row group is unpacked for
it. The last few are kept, which helps a scan; a shuffled read unpacks one per picture, and the
report says how large they are.
"""

from __future__ import annotations

import collections
import importlib
import threading
from collections.abc import Iterator
from typing import Any

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Item, texts_of

MAX_CACHED_BYTES = 512 << 20  # Of unpacked row groups; the one that was read last is always kept.
LARGE_ROW_GROUP_BYTES = (
    4 << 20
)  # Bytes; unpacking a larger one takes longer than decoding the picture.


class Tables:
    """Parquet files as a kind of source; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError: there are none, or no pyarrow."""
        try:
            self._pq = importlib.import_module("pyarrow.parquet")
            self._compute = importlib.import_module("pyarrow.compute")
        except ImportError as error:
            raise ConfigError(
                f"config.data.kind='parquet' needs the module {error.name!r}; install pyarrow"
            ) from None
        paths = files.find(source.path, [".parquet"])
        self._source, self._files = source, files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.image_key, source.caption_key]
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Item]:
        """The rows in the order of the files. Raises ConfigError for an absent column."""
        for number, name in enumerate(files.names(self._files.paths)):
            try:
                table = self._pq.ParquetFile(self._files.paths[number])
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors.
                yield Item(name, fault=f"unreadable ({' '.join(str(error).split())})")
                continue
            self._check_columns(table.schema_arrow.names)
            row = 0
            for group in range(table.num_row_groups):
                for item in self._group_items(table, number, group):
                    yield item._replace(key=f"{name}__{row}")
                    row += 1

    def read(self, key: str, place: Location) -> bytes:
        """The picture at `place`: file, offset, bytes; or file, -1 - row group, row."""
        del key
        number, where, row = place
        if where >= 0:
            return self._files.read(number, where, row)
        return self._group(number, -1 - where)[row].as_py()

    def _check_columns(self, names: list[str]) -> None:
        for field in ("image_key", "caption_key"):
            name = getattr(self._source, field)
            if name not in names:
                raise ConfigError(unknown_name(f"config.data.{field}", name, names))

    def _group_items(self, table: Any, number: int, group: int) -> Iterator[Item]:
        """The rows of a row group, their keys left to the caller."""
        captions = table.read_row_group(group, columns=[self._source.caption_key])[0].to_pylist()
        pictures = self._group(number, group)
        chunk = self._raw_chunk(table, number, group)
        notes = ()
        if chunk is None and pictures.nbytes > LARGE_ROW_GROUP_BYTES:
            size = f"{pictures.nbytes / 2**20:.0f} MB are unpacked for each picture"
            notes = (f"compressed row group ({size}; write it with compression='none')",)
        at = 0
        for row, (value, texts) in enumerate(zip(pictures, captions, strict=True)):
            place = (number, -1 - group, row)
            if not value.is_valid:
                yield Item("", texts_of(texts), fault="no picture")
                continue
            if chunk is not None:
                data = value.as_py()
                found = chunk[1].find(data, at)
                # Equal pictures may be stored once, then the first one is found again.
                found = chunk[1].find(data) if found < 0 else found
                if found >= 0:
                    place, at = (number, chunk[0] + found, len(data)), found + len(data)
                else:  # An encoding that takes values apart.
                    chunk = None
            yield Item("", texts_of(texts), place, notes=notes)

    def _raw_chunk(self, table: Any, number: int, group: int) -> tuple[int, bytes] | None:
        """Offset and bytes of the pictures' column in a row group, if they are not compressed."""
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
        """The pictures of a row group as a chunked Arrow array of bytes."""
        with self._lock:
            if (number, group) in self._groups:
                self._groups.move_to_end((number, group))
                return self._groups[number, group]
            table = self._pq.ParquetFile(self._files.paths[number])
            pictures = table.read_row_group(group, columns=[self._source.image_key])[0]
            fields = getattr(pictures.type, "names", None)
            if fields:
                if "bytes" not in fields:
                    raise ConfigError(
                        f"config.data.image_key={self._source.image_key!r} is a struct of "
                        f"{', '.join(fields)}; one with a field 'bytes' is needed"
                    )
                pictures = self._compute.struct_field(pictures, "bytes")
            self._groups[number, group] = pictures
            while len(self._groups) > 1 and _size(self._groups) > MAX_CACHED_BYTES:
                self._groups.popitem(last=False)
            return pictures


def _size(groups: dict[tuple[int, int], Any]) -> int:
    return sum(pictures.nbytes for pictures in groups.values())
