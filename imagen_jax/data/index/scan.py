"""The index pass: every record of a source is looked at once, and what was found is kept.

Whatever the kind of source, a picture is judged by the same rules, through the very read that
training uses. The result is a table of the usable records and a report on all others, cached
beside the data (or in the user's cache where that is read-only).
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from PIL import Image

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.table import Table, TableWriter
from imagen_jax.data.sources.records import (
    Item,
    Quarantine,
    Reader,
    caption_fault,
    caption_notes,
    clean,
    size_fault,
)
from imagen_jax.io import atomic, images

LAYOUT = 2  # Raised when the meaning of a cached index changes.
CHUNK = 32  # Records that a thread examines at a time.
A = TypeVar("A")
B = TypeVar("B")


class RecordCheck(NamedTuple):
    """What was found of one record: the bytes of its picture; a fault, or odd things."""

    item: Item
    size: int
    fault: str
    notes: tuple[str, ...]


def cached_index(reader: Reader, source: SourceConfig) -> tuple[Table, Quarantine, pathlib.Path]:
    """The index made earlier of the same data, or a new one.

    Returns:
      The usable records, the report, and the file in which the user finds it.
    """
    rules = [LAYOUT, source.kind, source.min_size, source.check]
    digest = hashlib.sha256(json.dumps([*rules, *reader.identity]).encode()).hexdigest()[:16]
    name = f"index_{digest}"
    places = _places(reader.cache)
    cache = next((place for place in places if (place / name).exists()), None)
    if cache is None:
        cache = _writable(places)
        _write_index(*build(reader, source), cache / name)
    written = json.loads((cache / name / "report.json").read_text("utf-8"))
    report = Quarantine(
        rejected=[(key, reason) for key, reason in written["rejected"]],
        total=written["total"],
        notes={sort: [(k, n) for k, n in pairs] for sort, pairs in written["notes"].items()},
        noted=written["noted"],
    )
    report_file = cache / "quarantine.json"
    with contextlib.suppress(OSError):  # An index that was made for all may be read-only here.
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
        atomic.write_text(report_file, text, errors="backslashreplace")
    return Table.load(cache / name), report, report_file


def build(reader: Reader, source: SourceConfig) -> tuple[Table, Quarantine]:
    """Looks at every record, as many at a time as there are processors."""
    table, report = TableWriter(), Quarantine()
    items = iter(reader.scan())
    chunks = iter(lambda: list(itertools.islice(items, CHUNK)), [])
    usable = 0
    for verdicts in _in_parallel(
        lambda chunk: [_check_record(reader, i, source) for i in chunk], chunks
    ):
        for item, size, fault, notes in verdicts:
            if fault:
                report.add(item.key, fault)
                continue
            usable += 1
            table.append(item.key, clean(item.captions), size, item.place)
            for remark in notes:
                report.note(item.key, remark)
    report.total = usable + len(report.rejected)
    return table.finish(), report


def _check_record(reader: Reader, item: Item, source: SourceConfig) -> RecordCheck:
    """Whether a record can be used."""
    if item.fault:
        return RecordCheck(item, 0, item.fault, ())
    try:
        data = reader.read(item.key, item.place)
        seen = images.look(data, source.check)
    except images.ImageError as error:
        return RecordCheck(item, 0, str(error), ())
    except OSError as error:
        return RecordCheck(item, 0, f"unreadable ({error.strerror})", ())
    fault = size_fault(min(seen.size), source.min_size) or caption_fault(item.captions)
    if fault:
        return RecordCheck(item, len(data), fault, ())
    notes = [*item.notes, *_name_notes(item.key, seen.format), *seen.notes]
    return RecordCheck(item, len(data), "", (*notes, *caption_notes(item.captions)))


def _name_notes(key: str, format: str) -> list[str]:
    suffix = pathlib.PurePosixPath(key).suffix.lower()
    promised = Image.registered_extensions().get(suffix)
    notes = [] if key.isascii() else ["name beyond ASCII"]
    if promised and promised != {"MPO": "JPEG"}.get(format, format):
        notes.append(f"wrong extension ({suffix} on a {format})")
    return notes


def _in_parallel(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` by threads, in order and without running far ahead; Pillow decodes outside the lock."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        under_way = collections.deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > 2 * threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _write_index(table: Table, report: Quarantine, folder: pathlib.Path) -> None:
    """Writes the index; one that another process has written meanwhile stays."""
    content = {
        "total": report.total,
        "rejected": report.rejected,
        "notes": report.notes,
        "noted": report.noted,
    }
    with atomic.folder(folder, replace=False) as temporary:
        table.save(temporary)
        (temporary / "report.json").write_text(json.dumps(content), encoding="utf-8")


def _places(folder: pathlib.Path) -> list[pathlib.Path]:
    """`folder` and, for read-only data, its stand-in in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return [folder, pathlib.Path(home) / "imagen_jax" / name]


def _writable(places: list[pathlib.Path]) -> pathlib.Path:
    """The first of the places that can be written, made if needed."""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    return pathlib.Path(tempfile.mkdtemp(prefix="imagen_index_"))
