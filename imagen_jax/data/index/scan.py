"""The index pass: reads and checks every record of a source once.

All kinds of source are checked by the same rules, and images are read as in training. The result is
a table of the usable records and a report on the rejected ones, cached beside the data, or in the
user's cache if the data folder is read-only.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from PIL import Image

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.decoding import RecordCheck, decode_captions
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

LAYOUT = 3  # Increased when the meaning of a cached index changes.
CHUNK = 32  # Records per task of a thread.
A = TypeVar("A")
B = TypeVar("B")


def cached_index(reader: Reader, source: SourceConfig) -> tuple[Table, Quarantine, pathlib.Path]:
    """Loads the cached index of the data, or builds and caches it.

    Returns:
      The usable records, the report, and the file that holds the report.
    """
    rules = [LAYOUT, source.kind, source.min_size, source.check]
    digest = hashlib.sha256(json.dumps([*rules, *reader.identity]).encode()).hexdigest()[:16]
    name = f"index_{digest}"
    folders = cache_folders(reader.cache)
    cache = next((folder for folder in folders if (folder / name).exists()), None)
    if cache is None:
        cache = _writable(folders)
        _write_index(*build(reader, source), cache / name)
    content = json.loads((cache / name / "report.json").read_text("utf-8"))
    report = Quarantine(
        rejected=[(key, reason) for key, reason in content["rejected"]],
        total=content["total"],
        notes={kind: [(k, n) for k, n in pairs] for kind, pairs in content["notes"].items()},
        noted=content["noted"],
        captions={int(number): images for number, images in content["captions"].items()},
        ignored={kind: (count, first) for kind, (count, first) in content["ignored"].items()},
    )
    report_file = cache / "quarantine.json"
    with contextlib.suppress(OSError):  # A shared index may be read-only for this user.
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
        atomic.write_text(report_file, text, errors="backslashreplace")
    return Table.load(cache / name), report, report_file


def build(reader: Reader, source: SourceConfig) -> tuple[Table, Quarantine]:
    """Checks every record, with one thread per processor."""
    table, report = TableWriter(), Quarantine()
    items = iter(reader.scan())
    chunks = iter(lambda: list(itertools.islice(items, CHUNK)), [])
    checked = _in_parallel(lambda chunk: [_check_image(reader, i, source) for i in chunk], chunks)
    usable = 0
    for item, size, fault, notes in decode_captions(itertools.chain.from_iterable(checked)):
        captions = cast("tuple[str, ...]", item.captions)
        if item.ignored:
            report.ignore(item.key, item.ignored)
        elif fault := fault or caption_fault(captions):
            report.add(item.key, fault)
        else:
            usable += 1
            kept = clean(captions)
            table.append(item.key, kept, size, item.location)
            report.captions[len(kept)] = report.captions.get(len(kept), 0) + 1
            for note in (*notes, *caption_notes(captions)):
                report.note(item.key, note)
    report.total = usable + len(report.rejected)
    return table.finish(), report


def _check_image(reader: Reader, item: Item, source: SourceConfig) -> RecordCheck:
    """Reads the image of a record and checks it."""
    if item.fault or item.ignored:
        return RecordCheck(item, 0, item.fault, ())
    try:
        data = reader.read(item.key, item.location)
        info = images.inspect_image(data, source.check)
    except images.ImageError as error:
        return RecordCheck(item, 0, str(error), ())
    except OSError as error:
        return RecordCheck(item, 0, f"unreadable ({error.strerror})", ())
    fault = size_fault(min(info.size), source.min_size)
    notes = (*item.notes, *_name_notes(item.key, info.format), *info.notes)
    return RecordCheck(item, len(data), fault, notes)


def _name_notes(key: str, format: str) -> list[str]:
    suffix = pathlib.PurePosixPath(key).suffix.lower()
    expected = Image.registered_extensions().get(suffix)
    notes = [] if key.isascii() else ["name not in ASCII"]
    if expected and expected != {"MPO": "JPEG"}.get(format, format):
        notes.append(f"wrong extension ({suffix} on a {format})")
    return notes


def _in_parallel(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` by threads, in order and with bounded lookahead; Pillow decodes without the GIL."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_index(table: Table, report: Quarantine, folder: pathlib.Path) -> None:
    """Writes the index; one that another process has written meanwhile stays."""
    content = {
        "total": report.total,
        "rejected": report.rejected,
        "notes": report.notes,
        "noted": report.noted,
        "captions": report.captions,
        "ignored": report.ignored,
    }
    with atomic.folder(folder, replace=False) as temporary:
        table.save(temporary)
        (temporary / "report.json").write_text(json.dumps(content), encoding="utf-8")


def cache_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Where an index may be: `folder`, the user's cache, the user's folder of temporary files.

    The last one is for read-only data and a user without a home folder, as in containers. Its name
    is the same in every command, so the index is found again.
    """
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    homes = [pathlib.Path(home) / "imagen_jax"] if os.path.isabs(home) else []
    own = [root for root in (_temporary(),) if not root.exists() or _is_own(root)]
    return [folder, *(root / name for root in (*homes, *own))]


def _temporary() -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir()) / f"imagen_jax_{os.getuid()}"


def _is_own(folder: pathlib.Path) -> bool:
    """Whether this is a folder, no link, of this user."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _writable(folders: list[pathlib.Path]) -> pathlib.Path:
    """The first folder that is writable, created if missing; warns if it is a temporary one.

    Raises:
      ConfigError: none is.
    """
    for folder in folders:
        is_temporary = folder.parent == _temporary()
        try:
            if is_temporary:
                folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            if is_temporary:
                warnings.warn(
                    f"the index is kept in {folder}, which the system may delete: neither the data "
                    "nor a home folder is writable; set XDG_CACHE_HOME to a lasting folder",
                    stacklevel=2,
                )
            return folder
    names = ", ".join(map(str, folders))
    raise ConfigError(f"no folder for the index is writable ({names}); set XDG_CACHE_HOME to one")
