"""Reading: overlapped reads, windows, a store that fails for a while or for good, stand-ins."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pathlib
import tempfile
import threading
import time

import jax
import numpy as np
import pytest

from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.order import permute_in_windows
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.index import patience
from imagen_jax.data.index.patience import StoreError
from imagen_jax.data.sources import files, records, registry
from tests.data.conftest import write_images
from tests.data.test_index_shards import open_folder, write_shard
from tests.data.test_pipeline import equal


@pytest.fixture
def stream(world):
    """(loader) -> a pipeline without a cache of images."""

    def make(loader: str) -> Pipeline:
        data, source, store = world
        data = dataclasses.replace(data, loader=loader, reads=5)
        return Pipeline(source, store, data, seed=4, cache_bytes=0)

    return make


@pytest.fixture
def reader(world, monkeypatch):
    """Replaces the function that reads an image: (key, location, original) -> bytes."""
    reader = world[1].reader
    original = type(reader).read

    def replace(read):
        monkeypatch.setattr(reader, "read", lambda key, at: read(key, at), raising=False)
        return functools.partial(original, reader)

    return replace


LOADERS = ["numpy", pytest.param("seqio", marks=pytest.mark.slow)]


@pytest.mark.parametrize("loader", LOADERS)
def test_images_of_a_batch_are_read_at_the_same_time(stream, reader, loader):
    pipeline, busy, most, lock = stream(loader), 0, 0, threading.Lock()
    expected = [pipeline.batch_at(step) for step in range(3)]

    def slow(key, at):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        return original(key, at)

    original = reader(slow)
    batches = loaders.batches(pipeline)
    for step in range(3):
        equal(next(batches), expected[step])
    batches.close()
    # `reads` of each batch, and `prefetch` batches.
    assert 5 < most <= 10


@pytest.mark.parametrize("loader", LOADERS)
def test_two_streams_of_a_pipeline_end_apart(stream, loader):
    """An evaluation reads the training data beside the training."""
    pipeline = stream(loader)
    training = loaders.batches(pipeline)
    next(training)
    evaluation = loaders.batches(pipeline, 7)
    equal(next(evaluation), pipeline.batch_at(7))
    evaluation.close()
    for step in range(1, 8):
        equal(next(training), pipeline.batch_at(step))
    training.close()


def test_text_reaches_the_device_in_bfloat16_and_the_model_in_float32(stream):
    pipeline = stream("numpy")
    batch = pipeline.batch_at(0)
    assert batch["text_emb"].dtype == "bfloat16"
    read = pipeline.encode(jax.device_put(batch))["text_emb"]
    assert read.dtype == "float32"
    np.testing.assert_array_equal(np.asarray(read), batch["text_emb"].astype(np.float32))


@pytest.fixture
def quick(monkeypatch):
    """Waits of milliseconds in place of seconds."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 1.0)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_store_that_fails_for_a_while_changes_no_batch(stream, reader, quick, loader):
    pipeline, started = stream(loader), time.monotonic()
    expected = [pipeline.batch_at(step) for step in range(3)]

    def fails(key, at):
        if time.monotonic() - started < 0.4 and key.endswith(("3.png", "7.png")):
            raise OSError(5, "Input/output error")
        return original(key, at)

    original = reader(fails)
    rejected = len(pipeline.source.report.rejected)
    batches = loaders.batches(pipeline)
    for step in range(3):
        equal(next(batches), expected[step])
    batches.close()
    assert len(pipeline.source.report.rejected) == rejected


@pytest.mark.parametrize("loader", LOADERS)
def test_a_store_that_stays_away_stops_the_run_with_one_line(
    stream, reader, quick, loader, monkeypatch
):
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 0.1)

    def fails(key, at):
        raise OSError(116, "Stale file handle")

    pipeline = stream(loader)
    reader(fails)
    batches = loaders.batches(pipeline)
    with pytest.raises(StoreError, match="cannot be read since 0 s .Stale file handle") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_lines_on_a_failing_store_are_few(quick, monkeypatch):
    lines, left = [], [40]

    class Reader(records.Reader):
        cache, identity = pathlib.Path(), []

        def scan(self):
            return iter(())

        def read(self, key, location):
            left[0] -= 1
            if left[0] > 0:
                raise OSError(5, "Input/output error")
            return b"image"

    assert patience.PatientReader(Reader(), lines.append).read("a", (0, 0, 0)) == b"image"
    assert len(lines) == 1 and "a: Input/output error" in lines[0]


def damaged_folder(path, count, damaged):
    path.mkdir()
    write_images(path, count, size=16)
    data = DataConfig(kind="folder", path=str(path), max_quarantined=0.5)
    source = registry.open_source(data, log=lambda line: None)
    for i in damaged:
        size = (path / f"{i:03d}.png").stat().st_size
        (path / f"{i:03d}.png").write_bytes(os.urandom(size))
    return source


def test_stand_ins_are_spread_and_the_same_for_all_hosts(tmp_path):
    damaged = range(10, 20)
    source = damaged_folder(tmp_path / "a", 60, damaged)
    keys = [source.record(i).key for i in range(60)]
    chosen = [keys[i] for i in damaged]
    assert len(set(chosen)) > 5, "not one image in place of all"
    assert not {f"{i:03d}.png" for i in damaged} & set(chosen)
    assert all(keys[i] == f"{i:03d}.png" for i in range(60) if i not in damaged)
    # Another host meets them in another order.
    other = copy.copy(source)
    other._broken = {}
    assert [other.record(i).key for i in reversed(damaged)] == chosen[::-1]


def test_too_many_damaged_images_stop_the_run(tmp_path, monkeypatch):
    source = damaged_folder(tmp_path / "a", 40, range(30))
    lines = []
    source._log = lines.append
    with pytest.raises(ConfigError, match="max_quarantined=0.5 but 21 of 40 images no longer"):
        for i in range(30):
            source.record(i)
    assert len(lines) < 15


@pytest.mark.parametrize("counts", [[5], [3, 0, 7, 1], [10] * 9])
@pytest.mark.parametrize("window", [4, 16, 1000])
def test_windows_visit_every_record_once_and_few_shards_at_a_time(counts, window):
    ends = np.cumsum(counts)
    n = int(ends[-1])
    orders = []
    for epoch in (0, 1, 10**6):
        at = np.arange(n)
        found = permute_in_windows(at, np.full(n, epoch), ends=ends, seed=3, window=window)
        np.testing.assert_array_equal(np.sort(found), at)
        orders.append(found.tolist())
        shards = np.searchsorted(ends, found, side="right")
        for start in range(0, n, window):
            # As many shards as the window's records need, and one cut at each end.
            part = shards[start : start + window]
            assert len(set(part.tolist())) <= -(-window // max(min(counts), 1)) + 1
    if n > 8:
        assert orders[0] != orders[1] != orders[2]
    alone = permute_in_windows(np.array([n - 1]), np.array([1]), ends=ends, seed=3, window=window)
    assert alone.tolist() == orders[1][-1:]


def test_a_run_in_windows_resumes_anywhere(tmp_path, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", number)
    source = open_folder(tmp_path, shuffle="window")
    n = len(source)
    whole = source.order(np.arange(3 * n), seed=1)
    for epoch in range(3):
        part = whole[epoch * n : (epoch + 1) * n]
        np.testing.assert_array_equal(np.sort(part), np.arange(n))
    for start in (0, 1, n - 1, n + 3):
        g = np.arange(start, start + n)
        np.testing.assert_array_equal(source.order(g, seed=1), whole[start : start + n])
    assert source.order_spec()["shuffle"] == "window"
    assert "shuffle" not in open_folder(tmp_path).order_spec()


def test_descriptors_are_pooled_and_opened_again_after_an_error(tmp_path, monkeypatch):
    paths = [tmp_path / str(i) for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 4)
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    pool = files.Files(paths)
    before = len(os.listdir("/proc/self/fd"))
    for i in (0, 1, 2, 3, 4, 5, 0, 5):
        assert pool.read(i, 1, 2) == bytes([i]) * 2
    assert len(os.listdir("/proc/self/fd")) == before + 3
    stale, pread = pool._open[5].number, os.pread

    def fail(descriptor, size, offset):
        if descriptor == stale:
            raise OSError(116, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    kept = os.open(paths[0], os.O_RDONLY)
    with pytest.raises(OSError, match="Stale"):
        pool.read(5, 0, 1)
    taken = os.open(paths[0], os.O_RDONLY)  # The number of the closed descriptor is free again.
    assert taken == stale and pool.read(5, 0, 1) == b"\5"
    os.close(kept)
    os.close(taken)


def test_synthetic_images_need_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    data = DataConfig(kind="synthetic", name="100x24")
    source = registry.open_source(data, log=lambda line: None)
    assert len(source) == 100 and source.captions(99) == ("synthetic image 99",)
    first = source.record(3).image
    assert first.shape == (24, 24, 3) and first.std() > 10
    assert (first != source.record(4).image).any()
    assert registry.open_source(data).fingerprint == source.fingerprint
    for name in ("", "100", "0x24", "100x0", "ax24"):
        with pytest.raises(ConfigError, match="must be NUMBERxSIDE"):
            registry.open_source(DataConfig(kind="synthetic", name=name))


def test_the_order_of_a_mixture_names_what_its_sources_add(tmp_path):
    write_shard(tmp_path / "0.tar", 0)
    plain = {"kind": "webdataset", "path": str(tmp_path), "max_quarantined": 0.9}
    parts = {"a": ComponentConfig(**plain), "b": ComponentConfig(**plain, shuffle="window")}
    quiet = {"log": lambda line: None}
    mixed = registry.open_source(DataConfig(mixture=parts), **quiet).order_spec()
    assert mixed["sources"] == {"b": {"shuffle": "window", "window": 65536}}
    same = {"a": parts["a"], "b": parts["a"]}
    assert "sources" not in registry.open_source(DataConfig(mixture=same), **quiet).order_spec()
