"""index/scan.py, known.py, shard.py: an index made shard by shard, killed, extended and copied."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index import check, jpeg_header, known, scan, table
from imagen_jax.data.sources import records, registry, tar, webdataset
from imagen_jax.io import images
from tests.data.conftest import add_sample

ROOT = pathlib.Path(__file__).parents[2]
SHARDS, SAMPLES = 4, 6


def jpeg(seed: int, size: int = 24, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def write_shard(path: pathlib.Path, number: int, samples: int = SAMPLES) -> None:
    """Images with a text each; the last one of a shard has no caption."""
    with tarfile.open(path, "w") as shard:
        for i in range(samples):
            parts = {"jpg": jpeg(100 * number + i), "txt": f"caption {number} {i}".encode()}
            if i == samples - 1:
                del parts["txt"]
            add_sample(shard, f"{number:03d}{i:03d}", parts)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    path = tmp_path / "data"
    path.mkdir()
    for number in range(SHARDS):
        write_shard(path / f"{number:05d}.tar", number)
    return path


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """Names of the shards that are read, in order."""
    read = []
    original = webdataset.WebDatasetReader.scan_shard

    def scan_shard(self, number):
        read.append(self.shards[number].name)
        return original(self, number)

    monkeypatch.setattr(webdataset.WebDatasetReader, "scan_shard", scan_shard)
    return read


def open_folder(path: pathlib.Path, **options):
    options = {"kind": "webdataset", "max_quarantined": 0.9, **options}
    return registry.open_source(DataConfig(path=str(path), **options), log=lambda line: None)


def rows(source) -> list[tuple]:
    at = range(len(source))
    return [(source.table.key(i), source.table.location(i), source.captions(i)) for i in at]


def index_files(path: pathlib.Path) -> dict[str, bytes]:
    found = sorted((path / ".imagen_index").rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() for p in found if p.is_file()}


def test_only_a_new_shard_is_read(folder, scanned):
    first = open_folder(folder)
    assert len(scanned) == SHARDS
    write_shard(folder / "00009.tar", 9)
    second = open_folder(folder)
    assert scanned[SHARDS:] == ["00009.tar"]
    assert rows(second)[: len(first)] == rows(first)
    assert len(second) == len(first) + SAMPLES - 1
    assert second.report.rejected_count == SHARDS + 1
    # A shard before the others shifts their numbers, not their rows.
    write_shard(folder / "0.tar", 0)
    third = open_folder(folder)
    assert scanned[SHARDS + 1 :] == ["0.tar"]
    for i in range(len(third)):
        assert third.record(i).captions


def test_a_copied_folder_is_not_new(folder, scanned, tmp_path):
    first = open_folder(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # New modification times.
    second = open_folder(copy)
    assert len(scanned) == SHARDS
    assert second.fingerprint == first.fingerprint and rows(second) == rows(first)
    np.testing.assert_array_equal(second.record(3).image, first.record(3).image)


def test_a_shard_that_is_rewritten_in_place_is_new(folder, scanned):
    """Even where neither its size nor one of the blocks of its tag differs."""
    path = folder / "00001.tar"
    first, tag = open_folder(folder), known.content_tag(path, path.stat().st_size)
    content = path.read_bytes()
    at = content.index(b"caption 1 2")
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"caption 9 9")
    os.utime(path, ns=(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "content_tag", lambda path, size: tag if "1.tar" in path.name else "")
        second = open_folder(folder)
    assert "00001.tar" in scanned[SHARDS:]
    changed = {a[2] for a in rows(second)} - {a[2] for a in rows(first)}
    assert changed == {("caption 9 9",)}


def test_shards_of_one_name_size_and_time_are_told_apart(tmp_path, scanned):
    """As from an object store whose files have no times."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", number)
        os.utime(tmp_path / name / "0.tar", ns=(0, 0))
        source = open_folder(tmp_path)
    assert scanned == ["0.tar", "0.tar"]
    assert {source.captions(i)[0][:9] for i in range(len(source))} == {"caption 0", "caption 1"}


def test_another_rule_reads_again_and_the_same_does_not(folder, scanned):
    open_folder(folder)
    open_folder(folder)
    open_folder(folder, check="header")
    assert len(scanned) == 2 * SHARDS


def test_the_fingerprint_of_many_records_is_that_of_the_shards(folder, monkeypatch, tmp_path):
    few = open_folder(folder)
    listed = [[k, few.table.size(i), *few.captions(i)] for i, (k, _, _) in enumerate(rows(few))]
    # As in earlier versions: the hash of all rows.
    assert few.fingerprint == hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    monkeypatch.setattr(table, "ROWS_HASHED", 3)
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns(".imagen_index"))
    many = open_folder(other)
    assert many.fingerprint != few.fingerprint and rows(many) == rows(few)
    shutil.rmtree(other / ".imagen_index")
    assert open_folder(other).fingerprint == many.fingerprint


def test_an_index_of_one_file_of_columns_is_used_as_it_is(folder, scanned):
    """As earlier versions wrote it: numbers as int64, the file's number in front of each place."""
    now = open_folder(folder)
    data = DataConfig(kind="webdataset", path=str(folder), max_quarantined=0.9)
    reader = webdataset.WebDatasetReader(data)
    old = folder / ".imagen_index" / scan._index_name(reader, data, 3)
    columns = {name: [] for name in ("keys", "texts", "key_ends", "text_ends", "caption_ends")}
    keys, texts, hashes = b"", b"", b""
    for key, _, captions in rows(now):
        keys += key.encode()
        columns["key_ends"].append(len(keys))
        for caption in captions:
            texts += caption.encode()
            hashes += hashlib.sha256(caption.encode()).digest()[:16]
            columns["text_ends"].append(len(texts))
        columns["caption_ends"].append(len(columns["text_ends"]))
    columns |= {"sizes": [now.table.size(i) for i in range(len(now))]}
    columns |= {"places": [n for i in range(len(now)) for n in now.table.location(i)]}
    shutil.rmtree(folder / ".imagen_index")
    old.mkdir(parents=True)
    for name, values in columns.items():
        np.save(old / f"{name}.npy", np.array(values, np.int64))
    for name, content in (("keys", keys), ("texts", texts), ("hashes", hashes)):
        np.save(old / f"{name}.npy", np.frombuffer(content, np.uint8))
    (old / "fingerprint.txt").write_text("0123456789abcdef")
    report = dataclasses.asdict(now.report)
    del report["unlisted"]
    (old / "report.json").write_text(json.dumps(report))
    del scanned[:]
    found = open_folder(folder)
    assert not scanned and found.fingerprint == "0123456789abcdef"
    assert rows(found) == rows(now)
    np.testing.assert_array_equal(found.hashes(), now.hashes())
    np.testing.assert_array_equal(found.record(5).image, now.record(5).image)


KILLED = """
import pathlib, sys, time
from imagen_jax.config.data import DataConfig
from imagen_jax.data.sources import registry, webdataset

original = webdataset.WebDatasetReader.scan_shard

def slow(self, number):
    with open(sys.argv[2], "a") as log:
        log.write(self.shards[number].name + "\\n")
    for item in original(self, number):
        time.sleep(0.004)
        yield item

webdataset.WebDatasetReader.scan_shard = slow
data = DataConfig(kind="webdataset", path=sys.argv[1], max_quarantined=0.9)
print(registry.open_source(data).fingerprint)
"""


@pytest.mark.slow
def test_ten_kills_give_the_same_index(folder, tmp_path):
    """No shard is read twice but the one in progress."""
    for number in range(SHARDS, 24):
        write_shard(folder / f"{number:05d}.tar", number)
    expected = open_folder(folder).fingerprint
    files = index_files(folder)
    shutil.rmtree(folder / ".imagen_index")
    log = tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(folder), str(log)]
    kills, seen = 0, 0
    while kills < 10:
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        while not log.exists() or len(log.read_text().split()) <= seen:
            assert worker.poll() is None, "finished before the last kill"
            time.sleep(0.002)
        time.sleep(0.01 * kills / 4)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        seen, kills = len(log.read_text().split()), kills + 1
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == expected
    assert len(log.read_text().split()) <= 24 + kills
    assert index_files(folder) == files


@pytest.mark.slow
def test_processes_make_the_index_of_one_process(folder, tmp_path, monkeypatch):
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    expected = open_folder(alone)
    monkeypatch.setattr(scan, "SHARED_FROM", 0)
    monkeypatch.setattr(scan, "_processors", lambda: 2)
    found = open_folder(folder)
    assert found.fingerprint == expected.fingerprint and rows(found) == rows(expected)
    assert dataclasses.asdict(found.report) == dataclasses.asdict(expected.report)


def test_an_error_of_a_shard_is_one_line(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"no record")
    with pytest.raises(ConfigError, match="of the records"):
        open_folder(tmp_path, kind="tfrecord", max_quarantined=0.05)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8))
    turned, thumbnail = Image.Exif(), Image.Exif()
    turned[0x0112] = 6
    thumbnail[0x9286] = b"x" * 40_000  # A header beyond the first bytes.
    return {
        "plain": saved(image, "jpeg"),
        "grey": saved(image.convert("L"), "jpeg"),
        "progressive": saved(image, "jpeg", progressive=True, quality=95),
        "turned": saved(image, "jpeg", exif=turned, quality=100),
        "long": saved(image, "jpeg", exif=thumbnail),
        "comment": saved(image, "jpeg", comment=b"a comment"),
        "cmyk": saved(image.convert("CMYK"), "jpeg"),
        "png": saved(image, "png"),
        "webp": saved(image, "webp"),
        "gif": saved(image.convert("P"), "gif"),
    }


NAMES = ["plain", "grey", "progressive", "turned", "long", "comment", "cmyk", "png", "webp", "gif"]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_bytes_give_what_the_whole_file_gives(encoded, name):
    data = encoded[name]
    expected = images.inspect_image(data, "header")
    asked = []

    class Reader(records.Reader):
        cache, identity = pathlib.Path(), []

        def scan(self):
            return iter(())

        def read(self, key, location):
            asked.append(len(data))
            return data

        def read_start(self, key, location, count):
            asked.append(min(count, len(data)))
            return data[:count], len(data)

    size, info = check._inspect_header(Reader(), records.Item(name))
    assert (size, info) == (len(data), expected)
    header_ends = name in ("plain", "grey", "progressive", "turned", "comment", "cmyk")
    assert (sum(asked) <= check.HEADER_BYTES) == (header_ends or len(data) <= check.HEADER_BYTES), (
        name
    )
    plain = jpeg_header.plain_size(data)
    assert plain == (expected.size if name in ("plain", "grey", "comment") else None)


def test_damaged_headers_are_left_to_pillow(encoded):
    data = encoded["plain"]
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data[: rng.integers(2, 700)])
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] = rng.integers(256)
        size = jpeg_header.plain_size(bytes(damaged))
        if size is not None:
            assert images.inspect_image(bytes(damaged), "header").size == size


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_by_tarfile(tmp_path, format, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as shard:
        for name, size in (("a.jpg", 5), ("d/é.txt", 0), ("x/" * 30 + "y" * 60, 700), ("b", 512)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 1_700_000_000
            shard.addfile(member, io.BytesIO(bytes(size)))
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        shard.addfile(folder)
    expected = tar._all_members(path)
    assert tar.members(path) == expected and len(expected[0]) == 4
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content[: rng.integers(1, len(content))])
        for at in rng.integers(0, len(damaged), rng.integers(0, 3)):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert tar.members(path) == tar._all_members(path)


def test_plain_headers_need_no_tarfile(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", 0)
    expected = tar.members(tmp_path / "a.tar")
    monkeypatch.setattr(tar.tarfile, "open", None)
    assert tar.members(tmp_path / "a.tar") == expected and len(expected[0]) == 2 * SAMPLES - 1


class Arrays:
    """A reader without shards that uses all numbers of a location, as docs/extending.md's does."""

    def __init__(self, source):
        self.cache = pathlib.Path(source.path) / ".imagen_index"
        self.identity = ["arrays"]

    def scan(self):
        for i in range(5):
            yield records.Item(f"image {i}", (f"caption {i}",), (i, 10 + i, 20 + i))

    def read(self, key, location):
        assert location == (location[0], 10 + location[0], 20 + location[0])
        return jpeg(location[0])


def test_a_reader_without_shards_gets_its_locations_back(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.SOURCES, "arrays", Arrays)
    source = open_folder(tmp_path, kind="arrays")
    assert [source.table.location(i) for i in range(5)] == [(i, 10 + i, 20 + i) for i in range(5)]
    for i in range(5):
        np.testing.assert_array_equal(source.record(i).image, images.decode(jpeg(i)))
    assert len(open_folder(tmp_path, kind="arrays", unique="bytes")) == 5
