"""Data and embeddings in a bucket: the batches of a disk, few requests, faults in one line."""

import dataclasses
import json
import os
import pathlib
import time

import numpy as np
import pytest

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings import embed
from imagen_jax.data.embeddings.claims import BucketClaims
from imagen_jax.data.embeddings.store import EmbeddingError, EmbeddingStore
from imagen_jax.data.index import patience
from imagen_jax.data.sources import registry
from imagen_jax.io import buckets, mirrors
from tests import object_stores
from tests.data import test_kinds
from tests.data.conftest import write_store
from tests.data.test_embed import CAPTIONS, LetterEncoder

image_files, packed = test_kinds.image_files, test_kinds.packed
KINDS = ["folder", "tar", "tfrecord", "plain", "dictionary", "struct"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def requests():
    with object_stores.in_memory() as counts:
        yield counts


@pytest.fixture(scope="module")
def store_folder(packed, tmp_path_factory) -> pathlib.Path:
    source = registry.open_source(packed["folder"], log=lambda line: None)
    texts = sorted({text for i in range(len(source)) for text in source.captions(i)})
    folder = tmp_path_factory.mktemp("embedded") / "store"
    write_store(folder, texts)
    return folder


def quiet(line: str) -> None:
    """Takes a line of the log."""


def upload(data: DataConfig, address: str) -> DataConfig:
    """Copies the files of a source to a bucket; the configuration that reads them there."""
    path = pathlib.Path(data.path)
    paths = sorted(path.parent.glob(path.name))
    files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    for file in files:
        if ".imagen_index" not in file.parts:
            name = file.relative_to(path.parent).as_posix()
            buckets.write(buckets.join(address, name), file.read_bytes())
    return dataclasses.replace(data, path=buckets.join(address, path.name))


@pytest.mark.parametrize("name", KINDS)
def test_batches_of_a_bucket_are_those_of_a_disk(
    name, packed, store_folder, requests, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = upload(packed[name], "s3://bucket/data")
    buckets.upload(store_folder, "gs://other/text")
    pipelines = []
    for config, text in ((packed[name], str(store_folder)), (data, "gs://other/text")):
        source = registry.open_source(config, log=quiet)
        pipelines.append(Pipeline(source, EmbeddingStore.open(text), config, seed=3))
    local, remote = pipelines
    assert remote.fingerprint() == local.fingerprint()
    assert local.source.report.rejected == remote.source.report.rejected
    for step in range(4):
        expected, batch = (pipeline.batch_at(step) for pipeline in pipelines)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value, err_msg=key)
    assert os.listdir(tmp_path) == ["cache"]


@pytest.mark.parametrize("name", ["tar", "folder"])
def test_a_start_makes_few_requests_whatever_the_number_of_objects(
    name, packed, requests, cache, monkeypatch
):
    data = upload(packed[name], "gs://bucket/data")
    first = registry.open_source(data, log=quiet)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.with_name("another_host")))
    requests.clear()
    other = registry.open_source(data, log=quiet)
    assert other.fingerprint == first.fingerprint and len(other) == len(first)
    assert requests["list"] == 0 and requests["write"] == 0
    assert requests["read"] <= 4  # An object or a folder?, names, index.
    requests.clear()
    registry.open_source(data, log=quiet)
    assert requests["list"] == 0 and requests["read"] <= 3  # The index is in the cache.


@pytest.mark.slow
def test_a_start_with_100_000_objects(requests, cache, monkeypatch):
    """50,000 images with a text each; an empty cache, as on a new machine."""
    png = test_kinds.encoded(test_kinds.noise(8, 8), "png")
    for i in range(50_000):
        buckets.write(f"gs://bucket/many/{i:05}.png", png)
        buckets.write(f"gs://bucket/many/{i:05}.txt", f"image {i}".encode())
    data = DataConfig(kind="folder", path="gs://bucket/many")
    first = registry.open_source(data, log=quiet, fresh=True)
    assert len(first) == 50_000 and requests["list"] == 1  # In a store: one per 1,000 objects.
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.with_name("another_host")))
    requests.clear()
    other = registry.open_source(data, log=quiet)
    assert other.fingerprint == first.fingerprint
    assert dict(requests) == {"read": requests["read"]} and requests["read"] <= 4


@pytest.mark.parametrize("unit_size", [1, 30])
def test_embeddings_open_with_few_requests(unit_size, requests, cache, monkeypatch):
    texts = [f"caption {i}" for i in range(30)]
    embed.embed(texts, LetterEncoder(), "gs://bucket/text", unit_size, quiet)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.with_name("another_host")))
    requests.clear()
    assert EmbeddingStore.open("gs://bucket/text").captions == 30
    assert requests["list"] == 0 and requests["read"] <= 5


def test_objects_that_are_added_or_replaced_are_found_by_prepare(packed, image_files, requests):
    data = upload(packed["tar"], "gs://bucket/data")
    before = registry.open_source(data, log=quiet)
    one = buckets.read("gs://bucket/data/shard-1.tar").data
    buckets.write("gs://bucket/data/shard-2.tar", one)
    assert len(registry.open_source(data, log=quiet)) == len(before)
    requests.clear()
    after = registry.open_source(data, log=quiet, fresh=True)
    assert len(after) > len(before)
    # The tags of three objects, the new one, the index of before: known shards are not read.
    assert requests["read"] <= 9
    buckets.write("gs://bucket/data/shard-0.tar", one)
    lines: list[str] = []
    stale = registry.open_source(data, log=lines.append)
    assert not stale.record(0).key.startswith("shard-0.tar/")  # A stand-in.
    assert any("changed since the index was made" in line for line in lines)
    fresh = registry.open_source(data, log=quiet, fresh=True)
    assert fresh.fingerprint not in (before.fingerprint, after.fingerprint)


def test_a_bucket_that_cannot_be_written_is_read_all_the_same(packed, requests, monkeypatch):
    data = upload(packed["tar"], "gs://bucket/data")

    def refuse(address, data, *, new=False):
        raise buckets.BucketError(f"{address}: PERMISSION_DENIED")

    monkeypatch.setattr(buckets, "write", refuse)
    assert len(registry.open_source(data, log=quiet)) == 15


def test_a_store_that_fails_while_the_index_is_made_rejects_nothing(packed, requests, monkeypatch):
    data = upload(packed["folder"], "gs://bucket/data")
    read = buckets.read

    def fail(address, *arguments):
        if address.endswith(".png"):
            raise buckets.BucketError(f"{address} cannot be used (UNAVAILABLE)")
        return read(address, *arguments)

    monkeypatch.setattr(buckets, "read", fail)
    with pytest.raises(buckets.BucketError, match="UNAVAILABLE"):
        registry.open_source(data, log=quiet)
    monkeypatch.setattr(buckets, "read", read)
    assert len(registry.open_source(data, log=quiet)) == 15


def test_a_store_that_fails_for_long_ends_the_run_in_one_line(packed, requests, monkeypatch):
    source = registry.open_source(upload(packed["tar"], "gs://bucket/data"), log=quiet)

    def fail(address, *arguments):
        raise buckets.BucketError(f"{address} cannot be used (UNAVAILABLE)")

    monkeypatch.setattr(buckets, "read", fail)
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 0.05)
    source.reader._files._copies.clear()  # pyright: ignore
    with pytest.raises(patience.StoreError, match=r"gs://bucket/data/shard-\d.tar.*UNAVAILABLE"):
        source.read(0)


def test_empty_and_missing_addresses(packed, requests):
    data = dataclasses.replace(packed["tar"], path="gs://bucket/nothing")
    with pytest.raises(buckets.BucketError, match="gs://bucket/nothing holds nothing"):
        registry.open_source(data, log=quiet)
    data = dataclasses.replace(packed["tar"], path="hdfs://bucket/nothing")
    with pytest.raises(ValueError, match="hdfs:// paths"):
        registry.open_source(data, log=quiet)
    with pytest.raises(EmbeddingError, match="gs://bucket/none.*run `imagen embed`"):
        EmbeddingStore.open("gs://bucket/none")
    buckets.write("gs://bucket/empty/readme.md", b"x")
    with pytest.raises(ConfigError, match="gs://bucket/empty.*no file ending with .tar"):
        registry.open_source(dataclasses.replace(data, path="gs://bucket/empty"), log=quiet)


def test_names_that_lead_out_of_a_mirror_are_left_out(requests, tmp_path):
    for name in ("a.png", "../b.png", "d/../../c.png", "d", "d/e.png"):
        buckets.write(f"gs://bucket/x/{name}", b"x")
    mirrors.files("gs://bucket/x")
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["a.png"]


def test_int8_and_packed_stores(store_folder, requests, tmp_path, monkeypatch):
    from imagen_jax.data.embeddings import packs, store

    texts = [f"caption {i}" for i in range(9)]
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(1 + i % 4, 6)).astype(np.float32) for i in range(9)]
    for dtype in ("bfloat16", "int8"):
        folder = tmp_path / dtype
        folder.mkdir()
        names = []
        for part in (slice(0, 4), slice(4, 9)):
            names.append(store.unit_name(texts[part], dtype=dtype))
            store.write_unit(folder / names[-1], texts[part], rows[part], dtype)
        monkeypatch.setattr(packs, "PACK_BYTES", 100)
        store.write_packed(folder, names, fingerprint={"a": 1}, plan="p")
        buckets.upload(folder, f"gs://bucket/{dtype}")
        local, remote = (EmbeddingStore.open(p) for p in (str(folder), f"gs://bucket/{dtype}"))
        for one, other in zip(local.lookup(texts, 5), remote.lookup(texts, 5), strict=True):
            np.testing.assert_array_equal(one, other)


def objects(address: str) -> dict[str, bytes]:
    """Content of all objects below an address."""
    return {name: buckets.read(buckets.join(address, name)).data for name in buckets.names(address)}


def test_embed_writes_the_bytes_of_a_disk_on_several_hosts(requests, cache, tmp_path, monkeypatch):
    alone = tmp_path / "alone"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(alone), 4, quiet)["units"]
    expected = {path.name: path.read_bytes() for path in alone.glob("[!.]*")}
    for attempt, left in enumerate((3, 2, 10**9)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{attempt}"))
        if left < 10**9:
            with pytest.raises(KeyboardInterrupt):
                embed.embed(CAPTIONS, LetterEncoder(left), "gs://bucket/text", 4, quiet)
        else:
            report = embed.embed(CAPTIONS, LetterEncoder(), "gs://bucket/text", 4, quiet)
            assert report["computed"] == units - 5
    assert objects("gs://bucket/text") == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert embed.embed(CAPTIONS, LetterEncoder(0), "gs://bucket/text", 4, quiet)["computed"] == 0
    found = [
        EmbeddingStore.open(path).lookup(CAPTIONS, 9) for path in (str(alone), "gs://bucket/text")
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    sizes = [path.stat().st_blocks for path in (tmp_path / "another").rglob("unit_*.bin")]
    assert len(sizes) == units


def test_the_claim_of_a_dead_worker_in_a_bucket_is_taken_over(requests, tmp_path):
    folder = mirrors.folder("s3://bucket/text")
    dead, second, third = (BucketClaims(folder, 0.3) for _ in range(3))
    assert dead.take("unit") and not second.take("unit") and not third.take("unit")
    time.sleep(0.4)
    taken = [second.take("unit"), third.take("unit")]
    assert taken == [True, False]
    with second:
        time.sleep(0.6)  # Its thread touches the claim.
        assert not third.take("unit")
        second.release("unit")
    assert buckets.names("s3://bucket/text") == []


def test_names_that_lead_out_of_the_mirror_are_left_out(requests, cache, tmp_path):
    """Of a hostile bucket, or of its list: nothing outside is made, written or removed."""
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")
    climbs = "../" * 9 + str(outside).lstrip("/")
    names = ["a.png", climbs, f"/{outside}", "b/../../c.png", "./d.png"]
    listed = {"names": names, "tags": {}}
    buckets.write("gs://bucket/data/a.png", b"x")
    buckets.write("gs://bucket/data/.imagen_index/objects.json", json.dumps(listed).encode())
    root = mirrors.files("gs://bucket/data")
    assert [path.name for path in root.rglob("*")] == ["a.png"]  # "." is no folder of a store.
    buckets.write(
        "gs://bucket/data/.imagen_index/objects.json",
        json.dumps({"names": ["a.png"], "tags": {}}).encode(),
    )
    mirrors.files("gs://bucket/data")
    assert outside.read_text() == "kept"


def test_paths_of_a_disk_make_no_folder(cache):
    assert mirrors.origin("data/a.png") is None
    assert not cache.exists()
