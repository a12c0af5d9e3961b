"""data.where and data.captions: the same records and captions for every kind of source."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config import overrides, where
from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.batches import view
from imagen_jax.data.batches.order import random_bits
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.sources import registry, tfrecord
from tests.data.conftest import add_sample, write_store
from tests.data.test_pipeline import equal
from tests.reference import tfrecords

KINDS = ("folder", "webdataset", "tfrecord", "parquet")
COUNT = 24


def png(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (16, 16 + i, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def row(i: int) -> dict:
    """Metadata of sample i; one of them lacks some of it."""
    found = {
        "caption": f"caption {i}",
        "recaption": f"a long description of number {i}",
        "alt": [f"alt {i}", f"another alt {i}"],
        "aesthetic": i / 4,
        "rating": i % 5,
        "licence": ("cc0", "by", "unknown")[i % 3],
    }
    return {"caption": found["caption"], "alt": found["alt"]} if i == 7 else found


def feature(value) -> bytes:
    """A serialised tf.train.Feature."""
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], float):
        packed = np.array(values, "<f4").tobytes()
        return tfrecords.field(2, tfrecords.field(1, packed))
    if isinstance(values[0], int):
        return tfrecords.field(3, tfrecords.field(1, bytes(values)))
    data = [v if isinstance(v, bytes) else v.encode() for v in values]
    return tfrecords.field(1, b"".join(tfrecords.field(1, item) for item in data))


def write(folder: pathlib.Path, kind: str) -> None:
    folder.mkdir()
    if kind == "folder":
        for i in range(COUNT):
            (folder / f"{i:03d}.png").write_bytes(png(i))
        lines = [json.dumps({"file_name": f"{i:03d}.png", **row(i)}) for i in range(COUNT)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    elif kind == "webdataset":
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as out:
                for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                    parts = {"png": png(i), "json": json.dumps(row(i)).encode()}
                    add_sample(out, f"{i:03d}", parts)
    elif kind == "tfrecord":
        for shard in range(2):
            records = b""
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                features = {"image": png(i), **row(i)}
                entries = b"".join(
                    tfrecords.field(
                        1, tfrecords.field(1, name.encode()) + tfrecords.field(2, feature(value))
                    )
                    for name, value in features.items()
                )
                records += tfrecords.record(tfrecords.field(1, entries))
            (folder / f"{shard}.tfrecord").write_bytes(records)
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{**dict.fromkeys(row(0)), "image": png(i), **row(i)} for i in range(COUNT)]
        table = arrow.Table.from_pylist(rows)
        parquet.write_table(table, folder / "a.parquet", row_group_size=7, compression="none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("selection")
    for kind in KINDS:
        write(root / kind, kind)
    return {kind: root / kind for kind in KINDS}


def open_kind(folders, kind: str, **options):
    data = DataConfig(kind=kind, path=str(folders[kind]), max_quarantined=0.2, **options)
    return registry.open_source(data, log=lambda line: None)


def numbers(source) -> list[int]:
    return [int(source.captions(i)[0].split()[-1]) for i in range(len(source))]


CONDITIONS = {
    "width>=20": lambda i, r: 16 + i >= 20,
    "width>=20 and aesthetic>2.5": lambda i, r: 16 + i >= 20 and r.get("aesthetic", -1) > 2.5,
    "20<=width<30": lambda i, r: 20 <= 16 + i < 30,
    "rating==3 or licence=='cc0' and height==16": lambda i, r: (
        r.get("rating") == 3 or r.get("licence") == "cc0"
    ),
    "(rating==3 or licence=='cc0') and aesthetic<3": lambda i, r: (
        (r.get("rating") == 3 or r.get("licence") == "cc0") and r["aesthetic"] < 3
    ),
    "licence in ['by', 'cc0'] and not rating<2": lambda i, r: (
        r.get("licence") in ("by", "cc0") and r["rating"] >= 2
    ),
    "rating not in (0, 1)": lambda i, r: r.get("rating", 0) not in (0, 1),
    "aesthetic > -1": lambda i, r: "aesthetic" in r,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_selects_the_same_records_of_every_kind(folders, condition):
    expected = [i for i in range(COUNT) if CONDITIONS[condition](i, row(i))]
    assert 0 < len(expected) < COUNT
    for kind in KINDS:
        source = open_kind(folders, kind, where=condition)
        assert numbers(source) == expected, kind
        for i in (0, len(source) - 1):
            assert source.record(i).image.shape[1] == 16 + expected[i]
        whole = open_kind(folders, kind)
        assert len(whole) == COUNT and whole.fingerprint != source.fingerprint
        assert len(source.hashes()) == len(expected)
        again = open_kind(folders, kind, where=condition)
        assert again.fingerprint == source.fingerprint and numbers(again) == expected


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        ("width>", "invalid syntax"),
        ("__import__('os').system('ls')", "is no comparison"),
        ("width", "is no comparison"),
        ("width + 1 > 2", "no field, number or text"),
        ("a.b > 2", "no field, number or text"),
        ("f(1) > 2", "no field, number or text"),
        ("width > True and x is 3", "compare"),
        ("licence in 'by'", "needs a list"),
        ("(" * 3000 + "a>1", "no condition"),
    ],
)
def test_conditions_that_are_none_are_refused_at_once(condition, why):
    with pytest.raises(ConfigError, match=why) as error:
        DataConfig(where=condition)
    assert "config.data.where=" in str(error.value) and "\n" not in str(error.value)


def test_conditions_that_fit_no_record_or_type(folders):
    with pytest.raises(ConfigError, match="selects none of 24 records"):
        open_kind(folders, "webdataset", where="width>1000")
    with pytest.raises(ConfigError, match="compares a text with a number .licence: string"):
        open_kind(folders, "webdataset", where="licence>3")
    assert where.names("b>1 and (a=='x' or b<3)") == ("a", "b")


WEIGHTS = {"recaption": 0.5, "alt": 0.3, "": 0.2}


def test_captions_of_every_kind_have_their_weights(folders, tmp_path):
    sources = {kind: open_kind(folders, kind, captions=WEIGHTS) for kind in KINDS}
    texts = sorted({t for s in sources.values() for i in range(COUNT) for t in s.captions(i)})
    store = write_store(tmp_path / "store", [*texts, ""])
    found = {}
    for kind, source in sources.items():
        data = DataConfig(kind=kind, captions=WEIGHTS, image_size=16, batch_size=8, max_text_len=4)
        pipeline = Pipeline(source, store, data, seed=2)
        found[kind] = [pipeline.batch_at(step) for step in (0, 5)]
        for batch, expected in zip(found[kind], found["folder"], strict=True):
            equal(batch, expected)
        assert pipeline.fingerprint()["captions"] == WEIGHTS
    without = write_store(tmp_path / "other", texts)
    with pytest.raises(ValueError, match="lacks 1 captions.*the first: ''"):
        Pipeline(sources["folder"], without, data, seed=2)


def test_captions_are_sampled_at_their_rates(folders):
    source = open_kind(folders, "parquet", captions=WEIGHTS)
    record, count = source.record(3), 20_000
    assert record.captions == (
        "alt 3",
        "another alt 3",
        "a long description of number 3",
        "",
    )
    bits = random_bits(np.arange(count), 5)
    captions = view.Captions(record.captions, record.weights)
    chosen = collections.Counter(view.choose_captions(bits, [captions] * count))
    for text, rate in zip(record.captions, (0.15, 0.15, 0.5, 0.2), strict=True):
        assert abs(chosen[text] / count - rate) < 0.015, text
    # An image without a field: the others keep their ratio.
    lacking = source.record(7)
    assert lacking.captions == ("alt 7", "another alt 7", "")
    np.testing.assert_allclose(lacking.weights, (0.15, 0.15, 0.2))


def test_captions_of_parts_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for name, data in (("1.png", png(1)), ("1.alt.txt", b"alt"), ("1.txt", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    data = DataConfig(kind="webdataset", path=str(tmp_path), captions={"alt": 1.0, "txt": 2.0})
    source = registry.open_source(data, log=lambda line: None)
    assert source.record(0).captions == ("alt", "text")
    assert source.record(0).weights == (1.0, 2.0)


def test_weights_in_a_configuration():
    with pytest.raises(ConfigError, match="'alt'=0.0 must be above 0"):
        DataConfig(captions={"alt": 0.0})
    with pytest.raises(ConfigError, match="the empty caption alone"):
        DataConfig(captions={"": 1.0})
    config = dataclasses.replace(Config(), data=DataConfig(captions=WEIGHTS))
    assert overrides.from_json(overrides.to_json(config)) == config
    values = overrides.to_config_dict(Config())
    values.data.captions = WEIGHTS
    assert overrides.from_config_dict(values) == config
    hash(config)


def test_features_of_examples_are_read_as_tensorflow_writes_them():
    tf = pytest.importorskip("tensorflow")
    example = tf.train.Example()
    example.features.feature["a"].float_list.value.extend([1.5, -2.0])
    example.features.feature["b"].int64_list.value.extend([3, -4, 1 << 40])
    example.features.feature["c"].bytes_list.value.extend([b"x", b"yz"])
    payload = memoryview(example.SerializeToString())
    found = tfrecord.parse_values(payload, ["a", "b", "c", "d"])
    assert found == {"a": [1.5, -2.0], "b": [3, -4, 1 << 40], "c": [b"x", b"yz"]}
