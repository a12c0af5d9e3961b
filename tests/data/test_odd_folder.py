"""400 files with other people's encodings, names and junk; the same content in packages."""

import dataclasses
import io
import itertools
import tarfile

import numpy as np
import pytest

from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.sources import registry
from tests.data.conftest import write_store
from tests.reference import odd_folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(builder with the expected table, configuration) of the folder."""
    builder = odd_folder.Builder(tmp_path_factory.mktemp("odd") / "my images")
    builder.build()
    data = DataConfig(
        kind="folder", path=str(builder.root), max_quarantined=0.5, min_size=16, image_size=16
    )
    return builder, dataclasses.replace(data, batch_size=16, max_text_len=4)


def test_every_image_is_used_or_rejected_for_the_true_reason(odd):
    builder, data = odd
    assert sum(path.is_file() for path in builder.root.rglob("*")) == odd_folder.COUNT
    lines = []
    source = registry.open_source(data, log=lines.append)
    found = {source.record(i).key: source.captions(i) for i in range(len(source))}
    expected = {e.name: e.captions for e in builder.entries if not e.reason}
    assert found.keys() == expected.keys()
    for name, captions in expected.items():
        assert found[name] == tuple(text.strip() for text in captions), name
    reasons = {entry.name: entry.reason for entry in builder.entries if entry.reason}
    said = dict(source.report.rejected)
    assert said.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert said[name].startswith(reason), (name, said[name])
    assert {kind: count for kind, (count, _) in source.report.ignored.items()} == builder.ignored
    assert source.report.captions == {1: len(expected)}
    noted = source.report.noted
    assert noted["caption in cp1252"] >= len(odd_folder.FRENCH)
    assert noted["caption in cp1251"] == len(odd_folder.RUSSIAN)
    assert noted["caption in cp932"] == len(odd_folder.JAPANESE)
    assert "11 junk" in lines[0] and "3 caption in cp1251" in lines[0]


def write_tar(path, entries):
    with tarfile.open(path, "w") as shard:
        for i, entry in enumerate(entries):
            suffix = entry.name.rpartition(".")[2] if "." in entry.name else "image"
            files = {f"{i:03}.{suffix}": entry.data}
            files |= {f"{i:03}.txt": raw for raw in entry.encoded}
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_tfrecord(path, entries):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(path)) as writer:
        for entry in entries:
            lists = {"image": [entry.data], "caption": list(entry.encoded)}
            features = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                for name, values in lists.items()
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def write_parquet(path, entries):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.array([e.encoded[0] if e.encoded else None for e in entries], pa.binary())
    table = pa.table({"image": [entry.data for entry in entries], "caption": texts})
    pq.write_table(table, path, compression="none")


PACKAGES = {"webdataset": write_tar, "tfrecord": write_tfrecord, "parquet": write_parquet}
SUFFIXES = {"webdataset": "tar", "tfrecord": "tfrecord", "parquet": "parquet"}


@pytest.fixture(scope="module")
def store(odd, tmp_path_factory):
    texts = {text.strip() for e in odd[0].entries if not e.reason for text in e.captions}
    return write_store(tmp_path_factory.mktemp("odd_store") / "store", sorted(texts))


@pytest.mark.parametrize("kind", PACKAGES)
def test_packages_of_it_give_the_same_batches(odd, store, kind, tmp_path):
    builder, data = odd
    path = tmp_path / f"all.{SUFFIXES[kind]}"
    entries = [e for e in builder.entries if kind != "webdataset" or not e.name.endswith(".psd")]
    PACKAGES[kind](path, entries)
    folder = registry.open_source(data, log=lambda line: None)
    packed = registry.open_source(
        dataclasses.replace(data, kind=kind, path=str(path)), log=lambda line: None
    )
    assert len(packed) == len(folder)
    for i in range(len(folder)):
        assert packed.captions(i) == folder.captions(i)
    for loader in ("numpy", "seqio"):
        if loader == "seqio":
            pytest.importorskip("seqio")
        options = dataclasses.replace(data, loader=loader)
        streams = [loaders.batches(Pipeline(s, store, options, seed=3)) for s in (folder, packed)]
        for ours, theirs in itertools.islice(zip(*streams, strict=True), 4):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                np.testing.assert_array_equal(theirs[name], value, err_msg=name)
