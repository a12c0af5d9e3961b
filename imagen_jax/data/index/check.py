"""Checks the records of one shard: every kind of source by the same rules, images as in training.

The result is the columns of the usable records (`shard.py`) and the report on the others.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.decoding import RecordCheck, decode_captions
from imagen_jax.data.index.jpeg_header import plain_size
from imagen_jax.data.index.shard import Row, ShardWriter
from imagen_jax.data.sources.records import (
    HeaderReader,
    Item,
    Quarantine,
    Reader,
    ShardedReader,
    caption_fault,
    caption_notes,
    clean,
    size_fault,
)
from imagen_jax.io import image_files, images
from imagen_jax.io.buckets import BucketError

CHUNK = 32  # Records per task of a thread.
HEADER_BYTES = 1 << 14  # Of a JPEG that are read first; its header ends there in most files.
_JPEG = b"\xff\xd8\xff"
A = TypeVar("A")
B = TypeVar("B")


class CheckedShard(NamedTuple):
    """Columns of the usable records of a shard, and its report as JSON values.

    Attributes:
      columns: see `shard.ShardWriter`.
      report: the fields of `Quarantine`; `digest` of the rows; numbers of `records` and `texts`.
    """

    columns: dict[str, np.ndarray]
    report: dict[str, Any]


def check_shard(
    reader: Reader, items: Iterable[Item], source: SourceConfig, *, name: str = "", threads: int = 1
) -> CheckedShard:
    """Checks every record of a shard.

    Args:
      reader: reads the images.
      items: the records.
      source: the rules.
      name: of the shard, left out of the names of its records.
      threads: that read images.
    """
    writer, report = ShardWriter(source.fields()), Quarantine()
    stream = iter(items)
    chunks = iter(lambda: list(itertools.islice(stream, CHUNK)), [])
    checked = _in_parallel(
        lambda chunk: [_check_image(reader, item, source) for item in chunk], chunks, threads
    )
    texts = 0
    # The number of the file is the shard's; a reader without shards may use all three numbers.
    first = 1 if isinstance(reader, ShardedReader) else 0
    for item, size, fault, notes, image_size in decode_captions(
        itertools.chain.from_iterable(checked)
    ):
        key = item.key.removeprefix(name)
        captions = cast("tuple[str, ...]", item.captions)
        if item.ignored:
            report.ignore(key, item.ignored)
        elif fault := fault or caption_fault(captions):
            report.add(key, fault)
        else:
            kept = clean(captions)
            kinds = [k for k, text in zip(item.kinds, captions, strict=False) if text.strip()]
            row = Row(key, kept, size, item.location[first:], image_size, item.fields, kinds)
            writer.append(row)
            texts += len(kept)
            report.captions[len(kept)] = report.captions.get(len(kept), 0) + 1
            for note in (*notes, *caption_notes(captions)):
                report.note(key, note)
    report.total = len(writer) + report.rejected_count
    columns, digest = writer.finish()
    counts = {"digest": digest, "records": len(writer), "texts": texts}
    return CheckedShard(columns, {**dataclasses.asdict(report), **counts})


def _check_image(reader: Reader, item: Item, source: SourceConfig) -> RecordCheck:
    """Reads the image of a record and checks it."""
    if item.fault or item.ignored:
        return RecordCheck(item, 0, item.fault, ())
    try:
        if source.check == "header":
            size, info = _inspect_header(reader, item)
        else:
            data = reader.read(item.key, item.location)
            size, info = len(data), images.inspect_image(data, source.check)
    except images.ImageError as error:
        return RecordCheck(item, 0, str(error), ())
    except BucketError:  # It says nothing about the image.
        raise
    except OSError as error:
        return RecordCheck(item, 0, f"unreadable ({error.strerror})", ())
    fault = size_fault(min(info.size), source.min_size)
    notes = (*item.notes, *_name_notes(item.key, info.format), *info.notes)
    return RecordCheck(item, size, fault, notes, info.size)


def _inspect_header(reader: Reader, item: Item) -> tuple[int, images.ImageInfo]:
    """Size in bytes and properties of an image; of a JPEG only the first bytes are read.

    Other formats may have their properties at the end of the file.
    """
    # Not by isinstance, which takes as long as the rest for a protocol.
    read_start = getattr(reader, "read_start", None)
    if read_start is not None:
        start, size = cast(HeaderReader, reader).read_start(item.key, item.location, HEADER_BYTES)
        if fault := image_files.size_fault(size):
            raise images.ImageError(fault)
        plain = plain_size(start)
        if plain is not None and plain[0] * plain[1] <= images.MAX_PIXELS:
            return size, images.ImageInfo(plain, "JPEG", ())
        if len(start) == size:
            return size, images.inspect_image(start, "header")
        if start.startswith(_JPEG):
            try:
                return size, images.inspect_image(start, "header")
            except images.ImageError:
                pass  # A header of more bytes, or a damaged one.
    data = reader.read(item.key, item.location)
    return len(data), images.inspect_image(data, "header")


def _name_notes(key: str, format: str) -> list[str]:
    suffix = os.path.splitext(key)[1].lower()
    expected = _EXTENSIONS.get(suffix)
    notes = [] if key.isascii() else ["name not in ASCII"]
    if expected and expected != {"MPO": "JPEG"}.get(format, format):
        notes.append(f"wrong extension ({suffix} on a {format})")
    return notes


_EXTENSIONS = Image.registered_extensions()


def _in_parallel(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map` by threads, in order and with bounded lookahead; Pillow decodes without the GIL."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
