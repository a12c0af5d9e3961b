"""The index pass and the search for duplicates as Beam pipelines.

A task is a shard: its rows are checked and published (`index/scan.py`), or the keys of its records
are computed (`index/duplicates.py`). Records with equal keys meet in a group by the hash of the
key; those with similar pixels in a second one by each band. Groups write pairs of record numbers
beside the index, and the command joins them as it joins its own.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.beam import pipeline
from imagen_jax.data.index import duplicates, folders, repeats, scan
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.index.known import ShardFile
from imagen_jax.data.index.repeats import KEY, Keyed
from imagen_jax.data.sources.records import Reader
from imagen_jax.data.sources.registry import open_one
from imagen_jax.io import atomic, buckets

GROUP = 1 << 22  # Records of one group, about 170 MB.

Group = tuple[Any, Keyed]  # What records meet by, and the records of one shard.


def sharing(options: str) -> scan.Share:
    """Checks the shards of an index by a pipeline with these options; see `pipeline.run`."""

    def share(
        source: SourceConfig,
        shards: Sequence[ShardFile],
        missing: Sequence[int],
        make_reader: Callable[[SourceConfig], Reader],
        log: Callable[[str], None],
    ) -> None:
        del log  # Beam's runners log their progress.
        reader = _Opener(source, make_reader, secrets.token_hex(8))
        check = functools.partial(_publish, reader=reader)
        tasks = [(number, shards[number].rows, shards[number].stat) for number in missing]

        def build(beam: Any, start: Any) -> Any:
            return spread(beam, start, tasks) | "check" >> beam.Map(check)

        pipeline.run(options, build, shards[0].rows.parent)

    return share


def find_duplicates(source: SourceConfig, kind: str, options: str) -> None:
    """Publishes which records of a source repeat another, where that is not known.

    Args:
      source: with its index.
      kind: one of `duplicates.KINDS`.
      options: see `pipeline.run`.
    """
    opener = Opener(source, secrets.token_hex(8))
    table, cache = opened(opener).table, _cache(opener)
    if duplicates.known(table, kind, cache) is not None:
        return
    name = duplicates.files(table, kind, cache)[0].stem
    out = cache / f".{name}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    bits = pipeline.partitions(len(table), GROUP)
    shards = [number for number, entry in enumerate(table.entries) if entry.records]

    def build(beam: Any, start: Any) -> Any:
        keys = functools.partial(_keys, opener=opener, kind=kind, bits=bits)
        equal, bands = functools.partial(_equal, out=out), functools.partial(_bands, bits=bits)
        grouped = spread(beam, start, shards) | "keys" >> beam.FlatMap(keys)
        found = grouped | "by key" >> beam.GroupByKey()
        if kind != "pixels":
            return found | "equal" >> beam.Map(equal)
        distinct = found | "distinct" >> beam.FlatMap(bands)
        near = distinct | "by band" >> beam.GroupByKey() | "near" >> beam.Map(_near, out=out)
        return (found | "equal" >> beam.Map(equal), near) | beam.Flatten()

    pairs = [np.load(out / name) for name in pipeline.run(options, build, out)]
    found = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    duplicates.publish(table, found, kind=kind, cache=cache)
    shutil.rmtree(out)


def check_address(*paths: str) -> None:
    """Raises ConfigError: one of these is in a bucket, where workers share no folder."""
    for path in paths:
        if buckets.is_address(path):
            raise ConfigError(
                f"--beam_options with {path!r}: the workers share a folder; give the path under "
                "which the bucket is mounted on all of them"
            )


class Opener(NamedTuple):
    """A source to open once per process and pipeline.

    Attributes:
      source: with its index.
      run: another text for each pipeline, as the data may change between two.
    """

    source: SourceConfig
    run: str


@functools.lru_cache(64)
def opened(opener: Opener) -> IndexedSource:
    """The source and its index."""
    return open_one(opener.source, log=lambda line: None)


def spread(beam: Any, start: Any, tasks: Sequence[Any]) -> Any:
    """The tasks, each free to run on any worker."""
    return start | "tasks" >> beam.Create(tasks) | "spread" >> beam.Reshuffle()


class _Opener(NamedTuple):
    """As `Opener`, of a source without an index."""

    source: SourceConfig
    make_reader: Callable[[SourceConfig], Reader]
    run: str


@functools.lru_cache(64)
def _opened(opener: _Opener) -> Reader:
    return opener.make_reader(opener.source)


def _publish(task: tuple[int, pathlib.Path, list[int]], reader: _Opener) -> str:
    """Writes the rows of a shard; returns the name of the file."""
    number, rows, stat = task
    if not rows.exists():
        scan.publish(_opened(reader), reader.source, number, rows, stat, threads=1)
    return rows.name


def _cache(opener: Opener) -> pathlib.Path:
    return folders.writable(folders.cache_folders(opened(opener).cache))


def _keys(number: int, opener: Opener, kind: str, bits: int) -> Iterator[Group]:
    """The keys of a shard, divided by their hash."""
    table, reader = opened(opener).table, opened(opener).reader
    keys = duplicates.shard_keys(table, reader, number, kind=kind, cache=_cache(opener))
    first = int(table.ends()[number]) - len(keys)
    yield from _divided(Keyed(first + np.arange(len(keys)), keys), _hashes(keys, bits))


def _equal(group: tuple[int, Iterable[Keyed]], out: pathlib.Path) -> str:
    """Writes the pairs of equal keys; returns the name of the file."""
    name, parts = group
    return _write(out / f"equal_{name:05d}.npy", repeats.equal(_joined(parts))[1])


def _bands(group: tuple[int, Iterable[Keyed]], bits: int) -> Iterator[Group]:
    """The distinct keys for each band, divided by its value."""
    distinct = repeats.equal(_joined(group[1]))[0]
    for band in range(repeats.BANDS):
        values = repeats.band_values(distinct.keys, band)
        for part, records in _divided(distinct, _mixed(values.astype(np.uint64), bits)):
            yield (band, part), records


def _near(group: tuple[tuple[int, int], Iterable[Keyed]], out: pathlib.Path) -> str:
    """Writes the pairs of similar keys; returns the name of the file."""
    (band, part), parts = group
    return _write(out / f"near_{band}_{part:05d}.npy", repeats.near(_joined(parts), band))


def _joined(parts: Iterable[Keyed]) -> Keyed:
    numbers, keys = zip(*parts, strict=True)
    return Keyed(np.concatenate(numbers), np.concatenate(keys))


def _divided(records: Keyed, groups: np.ndarray) -> Iterator[Group]:
    """The records of each group."""
    order = np.argsort(groups, kind="stable")
    found, starts = np.unique(groups[order], return_index=True)
    for name, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        yield name, Keyed(records.numbers[rows], records.keys[rows])


def _hashes(keys: np.ndarray, bits: int) -> np.ndarray:
    """`bits` bits for each key, evenly distributed also where the keys begin alike."""
    words = np.ascontiguousarray(keys, KEY).view("<u8").reshape(len(keys), -1)
    mixed = np.zeros(len(keys), np.uint64)
    for column in words.T:
        mixed = (mixed ^ column) * _ODD
        mixed ^= mixed >> np.uint64(29)
    return _mixed(mixed, bits)


def _mixed(values: np.ndarray, bits: int) -> np.ndarray:
    return ((values + np.uint64(1)) * _ODD) >> np.uint64(64 - bits)


_ODD = np.uint64(int.from_bytes(hashlib.sha256(b"odd").digest()[:8], "little") | 1)


def _write(path: pathlib.Path, pairs: np.ndarray) -> str:
    with atomic.file(path) as temporary, temporary.open("wb") as file:
        np.save(file, pairs)
    return path.name
