"""Any source of captioned pictures as random access: record i is one read.

An index pass over the source, done once and cached beside it, notes where every usable record lies
and which ones are not usable (the quarantine). From then on the order of the data is arithmetic on
positions (pipeline.py). A new kind of source is a reader such as folder.py and a row of SOURCES.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

from imagen_jax import images
from imagen_jax.config import ConfigError, DataConfig
from imagen_jax.data import folder, tfrecord
from imagen_jax.data.records import Entry, Quarantine, Record

__all__ = ["Entry", "Quarantine", "Record", "Source", "open_source"]

CACHE = ".imagen_index"
Log = Callable[[str], None]
LAYOUT = 1  # Raised when the meaning of a cached index changes.


class Source:
    """Random access to captioned pictures.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
      report: the records that are not used; grows if one fails to decode later.
    """

    def __init__(
        self,
        *,
        entries: list[Entry],
        read: Callable[[Entry], bytes],
        report: Quarantine,
        log: Log = print,
    ) -> None:
        """Wraps the result of an index pass.

        Args:
          entries: the usable records.
          read: gives the encoded picture of one.
          report: the records that are not usable.
          log: receives a line for each record that turns out damaged later.
        """
        self._entries = entries
        self._read = read
        self._log = log
        self._broken: set[int] = set()
        self.report = report
        rows = [[e.key, e.size, *e.captions] for e in entries]
        self.fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._entries)

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; no picture is decoded."""
        return self._entries[i].captions

    def record(self, i: int) -> Record:
        """Record i, or the next one that decodes if it has been damaged since the index pass.

        The rule is fixed, so that positions never shift; the damaged one is named in the report.

        Raises:
          ConfigError: no record at all decodes.
        """
        for offset in range(len(self)):
            at = (i + offset) % len(self)
            entry = self._entries[at]
            if at in self._broken:
                continue
            try:
                return Record(entry.key, images.decode(self._read(entry)), entry.captions)
            except (images.PictureError, OSError) as error:
                self._broken.add(at)
                self.report.add(entry.key, str(error))
                self._log(f"{entry.key}: {error}; the next record is used in its place")
        raise ConfigError("config.data.path: no record can be decoded any more")


def open_source(data: DataConfig, log: Log = print) -> Source:
    """Opens the pictures and captions that a configuration names; indexes them the first time.

    Args:
      data: kind, path and the limits of the quarantine.
      log: receives a line when records are quarantined.

    Raises:
      ConfigError: nothing there, damaged files, or a share of unusable records above
        `data.max_quarantined`.
    """
    if not data.path:
        raise ConfigError(f"config.data.path is empty; give the {data.kind} data's folder")
    source, report_file = SOURCES[data.kind](data, log)
    if source.report.rejected:
        log(f"{data.path}: {source.report.summary()} (all in {report_file})")
    source.report.check(data.max_quarantined)
    return source


def _open_folder(data: DataConfig, log: Log) -> tuple[Source, pathlib.Path]:
    root = pathlib.Path(data.path)
    if not root.is_dir():
        raise ConfigError(f"config.data.path={data.path!r} is not a folder")
    files = folder.walk(root)
    entries, report, report_file = _cached_index(
        cache=_writable(root / CACHE),
        key=[files, data.min_size],
        build=lambda report: folder.index(root, files, min_size=data.min_size, report=report),
    )

    def read(entry: Entry) -> bytes:
        return (root / entry.key).read_bytes()

    return Source(entries=entries, read=read, report=report, log=log), report_file


def _open_tfds(data: DataConfig, log: Log) -> tuple[Source, pathlib.Path]:
    root = tfrecord.find(data)
    files = tfrecord.shards(root, data.split)
    paths = list(files)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    entries, report, report_file = _cached_index(
        cache=_writable(root / CACHE / data.split),
        key=[stats, data.image_key, data.caption_key, data.min_size],
        build=lambda report: tfrecord.index(files, data, min_size=data.min_size, report=report),
    )
    handles: dict[int, int] = {}

    def read(entry: Entry) -> bytes:
        number, offset, size = entry.place
        if number not in handles:
            handles[number] = os.open(paths[number], os.O_RDONLY)
        return os.pread(handles[number], size, offset)

    return Source(entries=entries, read=read, report=report, log=log), report_file


SOURCES: dict[str, Callable[[DataConfig, Log], tuple[Source, pathlib.Path]]] = {
    "folder": _open_folder,
    "tfds": _open_tfds,
}


def _cached_index(
    *, cache: pathlib.Path, key: list, build: Callable[[Quarantine], list[Entry]]
) -> tuple[list[Entry], Quarantine, pathlib.Path]:
    """The index stored under `key`, or a new one; with the file of the quarantine report."""
    digest = hashlib.sha256(json.dumps([LAYOUT, *key]).encode()).hexdigest()[:16]
    path = cache / f"index_{digest}.json"
    report_file = cache / "quarantine.json"
    if path.exists():
        stored = json.loads(path.read_text())
        report = Quarantine([(k, reason) for k, reason in stored["rejected"]], stored["total"])
        rows = stored["entries"]
        entries = [Entry(k, tuple(texts), size, tuple(place)) for k, texts, size, place in rows]
        return entries, report, report_file
    report = Quarantine()
    entries = build(report)
    stored = {"total": report.total, "rejected": report.rejected, "entries": entries}
    _write(path, json.dumps(stored))
    listing = [{"name": k, "reason": reason} for k, reason in report.rejected]
    summary = {"total": report.total, "counts": report.counts(), "records": listing}
    _write(report_file, json.dumps(summary, indent=1, ensure_ascii=False))
    return entries, report, report_file


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def _writable(folder: pathlib.Path) -> pathlib.Path:
    """`folder`, made if needed; for read-only data, its stand-in in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    for place in (folder, pathlib.Path(home) / "imagen_jax" / name):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    return pathlib.Path(tempfile.mkdtemp(prefix="imagen_index_"))
