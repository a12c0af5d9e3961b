"""The index pass: reads and checks every record of a source once, shard by shard.

The rows of a shard are published as a file as soon as it is checked (`shard.py`), so that a pass
that is killed goes on where it was, and shards that are added later are the only ones read
(`known.py`). Many shards are shared by processes, one per processor. The index of a source is the
list of its shards and the sum of their reports, cached beside the data, or in the user's cache if
the data folder is read-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index import duplicates, known, shared
from imagen_jax.data.index import shard as shard_file
from imagen_jax.data.index.check import check_shard
from imagen_jax.data.index.folders import cache_folders, writable
from imagen_jax.data.index.known import ShardFile
from imagen_jax.data.index.selection import select
from imagen_jax.data.index.shard import Shard
from imagen_jax.data.index.table import Entry, Table
from imagen_jax.data.sources import files
from imagen_jax.data.sources.records import Quarantine, Reader, ShardedReader
from imagen_jax.io import atomic

LAYOUT = 4  # Increased when the meaning of a cached index changes.
ONE_FILE_LAYOUT = 3  # The earlier layout: all shards in one table. Such an index is used as it is.
# Bytes of shards to read from which processes are started; each takes seconds to start.
SHARED_FROM = 256 << 20
REPORT_EVERY = 20.0  # Seconds between progress lines.

MakeReader = Callable[[SourceConfig], Reader]
Log = Callable[[str], None]

# Writes the rows of the shards with these numbers, by `publish`, wherever it runs.
Share = Callable[[SourceConfig, Sequence[ShardFile], Sequence[int], MakeReader, Log], None]


def cached_index(
    reader: Reader,
    source: SourceConfig,
    make_reader: MakeReader | None = None,
    log: Log = print,
    share: Share | None = None,
) -> tuple[Table, Quarantine, pathlib.Path]:
    """Loads the cached index of the data, or builds and caches it.

    Args:
      reader: of the source.
      source: the rules.
      make_reader: makes the same reader in other processes; None: this process does all.
      log: called with lines on the progress of a long pass.
      share: checks shards elsewhere; None: processes of this machine do, where that is worth it.

    Returns:
      The usable records, the report, and the file that holds the report.
    """
    names = [_index_name(reader, source, layout) for layout in (LAYOUT, ONE_FILE_LAYOUT)]
    if source.where or source.captions:
        names.pop()  # The earlier layout has no fields.
    folders = cache_folders(reader.cache)
    found = [(folder, name) for name in names for folder in folders if (folder / name).exists()]
    if not found and shared.pull(reader.cache, names[0]):
        found = [(reader.cache, names[0])]
    if not found:
        folder = writable(folders)
        _build_index(reader, source, folder, make_reader=make_reader, log=log, share=share)
        shared.push(folder, names[0])
        found = [(folder, names[0])]
    cache, name = found[0]
    report = Quarantine()
    report.merge(json.loads((cache / name / "report.json").read_text("utf-8")))
    report_file = cache / "quarantine.json"
    with contextlib.suppress(OSError):  # A shared index may be read-only for this user.
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
        atomic.write_text(report_file, text, errors="backslashreplace")
    table = Table.load(cache / name, cache / "shards")
    if source.where:
        table = select(table, source.where, writable([cache, *folders]))
    if source.unique:
        home = writable([cache, *folders])
        table = duplicates.without(table, reader, kind=source.unique, cache=home)
    return table, report, report_file


def build(
    reader: Reader, source: SourceConfig, threads: int | None = None
) -> tuple[Table, Quarantine]:
    """Checks every record in this process and keeps the rows in memory.

    Args:
      reader: of the source.
      source: the rules.
      threads: that read images; None: one per processor.
    """
    shards: dict[str, Shard] = {}
    entries, report = [], Quarantine()
    for number, name in enumerate(_shard_names(reader)):
        columns, content = _check(reader, source, number, threads or _processors())
        shards[str(number)] = Shard(columns)
        entries.append(_entry(name, str(number), content))
        report.merge(content, name)
    return Table(entries, shards.__getitem__), report


def _build_index(
    reader: Reader,
    source: SourceConfig,
    cache: pathlib.Path,
    *,
    make_reader: MakeReader | None,
    log: Log,
    share: Share | None,
) -> None:
    """Checks the shards that are not known, and writes the index of all."""
    rules = [LAYOUT, source.kind, source.min_size, source.check, *_requested(source)]
    shards = []
    if isinstance(reader, ShardedReader):
        shards = known.identify(reader, [*rules, *reader.identity[1:]], cache)
        rows = [shard.rows for shard in shards]
    else:
        name = _index_name(reader, source, LAYOUT).replace("index", "whole")
        rows = [cache / "shards" / f"{name}.safetensors"]
    missing = [number for number, path in enumerate(rows) if not path.exists()]
    if share is None and _is_worth_sharing(shards, missing):
        share = _share
    if share is not None and make_reader is not None and shards and missing:
        share(source, shards, missing, make_reader, log)
    else:
        progress = _Progress(len(missing), log)
        for number in missing:
            publish(reader, source, number, rows[number], shards[number].stat if shards else [])
            progress.add()
    entries, report = [], Quarantine()
    for name, path in zip(_shard_names(reader), rows, strict=True):
        content = shard_file.read_report(path)
        entries.append(_entry(name, path.name, content))
        report.merge(content, name)
    table = Table(entries, lambda file: shard_file.read(cache / "shards" / file))
    # An index that another process has written meanwhile stays.
    with atomic.folder(cache / _index_name(reader, source, LAYOUT), replace=False) as temporary:
        table.save(temporary)
        known.write_files(temporary, shards, cache)
        text = json.dumps(dataclasses.asdict(report))
        (temporary / "report.json").write_text(text, encoding="utf-8")


def _index_name(reader: Reader, source: SourceConfig, layout: int) -> str:
    rules: list[Any] = [layout, source.kind, source.min_size, source.check]
    if source.fields() or source.captions:
        rules += _requested(source)
    text = json.dumps([*rules, *reader.identity])
    return f"index_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _requested(source: SourceConfig) -> list[list[str]]:
    """Names of the metadata that the rows hold."""
    return [list(source.fields()), list(source.caption_names())]


def _shard_names(reader: Reader) -> list[str]:
    """The names with which the keys of the shards' records begin; one "" for a whole source."""
    return files.names(reader.shards) if isinstance(reader, ShardedReader) else [""]


def _entry(name: str, file: str, content: dict[str, Any]) -> Entry:
    return Entry(name, file, content["digest"], content["records"], content["texts"])


def _check(reader: Reader, source: SourceConfig, number: int, threads: int):
    """The columns and the report of a shard."""
    if not isinstance(reader, ShardedReader):
        return check_shard(reader, reader.scan(), source, threads=threads)
    # Reading headers holds the GIL: threads would only wait for each other.
    threads = 1 if source.check == "header" else threads
    name = _shard_names(reader)[number]
    return check_shard(reader, reader.scan_shard(number), source, name=name, threads=threads)


def publish(
    reader: Reader,
    source: SourceConfig,
    number: int,
    rows: pathlib.Path,
    stat: Sequence[int],
    threads: int | None = None,
) -> None:
    """Checks a shard and writes the file of its rows.

    Args:
      reader: of the source.
      source: the rules.
      number: of the shard.
      rows: the file.
      stat: of the shard, `ShardFile.stat`.
      threads: that read images; None: one per processor.
    """
    columns, report = _check(reader, source, number, threads or _processors())
    shard_file.write(rows, columns, {**report, "stat": list(stat)})


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_worth_sharing(shards: Sequence[ShardFile], missing: Sequence[int]) -> bool:
    return len(missing) > 1 < _processors() and sum(shards[n].size for n in missing) >= SHARED_FROM


def _share(
    source: SourceConfig,
    shards: Sequence[ShardFile],
    missing: Sequence[int],
    make_reader: MakeReader,
    log: Log,
) -> None:
    """Checks shards in processes. Raises ConfigError: that of a process, or one was killed."""
    progress = _Progress(len(missing), log)
    # Not by fork: JAX has threads.
    context = multiprocessing.get_context("spawn")
    workers = min(_processors(), len(missing))
    with ProcessPoolExecutor(workers, context, _start_worker, (make_reader, source)) as pool:
        tasks = [pool.submit(_work, n, shards[n].rows, shards[n].stat) for n in missing]
        try:
            for task in as_completed(tasks):
                task.result()
                progress.add()
        except BrokenProcessPool:
            raise ConfigError(
                f"config.data.path={source.path!r}: a process of the index pass was killed, "
                "perhaps for lack of memory; run the same command again, it continues there"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[Reader, SourceConfig] | None = None  # Of a process of `_share`.


def _start_worker(make_reader: MakeReader, source: SourceConfig) -> None:
    global _worker
    _worker = make_reader(source), source
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(number: int, rows: pathlib.Path, stat: Sequence[int]) -> None:
    assert _worker is not None
    publish(*_worker, number, rows, stat, threads=1)


class _Progress:
    """Logs how many shards are checked."""

    def __init__(self, total: int, log: Log) -> None:
        self._total, self._log, self._done = total, log, 0
        self._started = self._reported = time.monotonic()

    def add(self) -> None:
        """Counts a shard; logs a line every `REPORT_EVERY` seconds."""
        self._done += 1
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            left = (now - self._started) * (self._total - self._done) / self._done
            self._log(f"index: {self._done:,} of {self._total:,} shards, {left:,.0f} s left")


def read_indexes(cache: pathlib.Path) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Fingerprint and opener of every index of the data whose indexes are in `cache`."""
    for folder in cache_folders(cache):
        for index in sorted(folder.glob("index_*")):
            file = index / "fingerprint.txt"
            if file.is_file():
                yield file.read_text(), lambda at=index: Table.load(at, at.parent / "shards")
