"""The same images from a folder, a tar file, TFRecord and Parquet give the same batches."""

import dataclasses
import io
import json
import pathlib
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources import registry
from tests.data.conftest import write_store

KEYS = {"image_key": "jpg", "caption_key": "words"}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def image_files() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """File name -> bytes and captions, in the order of the names; some of them not usable."""
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    grey16 = Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40)
    made = {
        f"a{i:02}.{kind}": encoded(noise(40 + i, 60 - i, seed=i), kind)
        for i, kind in enumerate(["png", "jpeg"] * 4)
    }
    made |= {
        "b_animated.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "b_cmyk.jpg": encoded(noise(40, 40).convert("CMYK"), "jpeg"),
        "b_cut.jpg": encoded(noise(90, 90), "jpeg")[:2000],
        "b_dot.png": encoded(noise(1, 1), "png"),
        "b_empty.png": b"",
        "b_long.png": encoded(noise(40, 40, seed=9), "png"),
        "b_png_inside.jpg": encoded(noise(40, 41, seed=10), "png"),
        "b_silent.png": encoded(noise(40, 40, seed=11), "png"),
        "b_sixteen.png": encoded(grey16, "png"),
        "b_turned.jpg": encoded(noise(40, 80), "jpeg", exif=turned),
        "я_кириллица.png": encoded(noise(40, 40, seed=12), "png"),
    }
    texts = {name: (f"a picture called {name}", f"also {name}") for name in made}
    texts["b_long.png"] = ("word " * 5000,)
    texts["b_silent.png"] = ()
    return {name: (made[name], texts[name]) for name in sorted(made)}


def write_folder(path: pathlib.Path, image_files) -> None:
    path.mkdir()
    for name, (data, texts) in image_files.items():
        (path / name).write_bytes(data)
        if texts:
            (path / name).with_suffix(".txt").write_text("\n".join(texts))


def write_tar(path: pathlib.Path, image_files) -> None:
    """Two shards; captions as text in the first, as JSON in the second."""
    names = list(image_files)
    for number, part in enumerate((names[:7], names[7:])):
        with tarfile.open(f"{path}-{number}.tar", "w") as shard:
            for name in part:
                data, texts = image_files[name]
                stem = name.rsplit(".", 1)[0]
                files = {name: data}
                if texts and number == 0:
                    files[f"{stem}.txt"] = "\n".join(texts).encode()
                elif texts:
                    files[f"{stem}.json"] = json.dumps({"words": texts, "width": 3}).encode()
                for file, content in files.items():
                    member = tarfile.TarInfo(file)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def write_tfrecord(path: pathlib.Path, image_files) -> None:
    tf = pytest.importorskip("tensorflow")

    def feature(values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for data, texts in image_files.values():
            features = {"jpg": feature([data])}
            if texts:  # Writers of one's own leave out what is not there.
                features["words"] = feature([text.encode() for text in texts])
            row = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(row.SerializeToString())


def write_parquet(path: pathlib.Path, image_files, as_struct: bool = False, **options) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = [data for data, _ in image_files.values()]
    if as_struct:
        column = [{"bytes": data, "path": name} for name, (data, _) in image_files.items()]
    table = pa.table({"jpg": column, "words": [list(texts) for _, texts in image_files.values()]})
    pq.write_table(table, path, row_group_size=6, **options)


@pytest.fixture(scope="module")
def packed(image_files, tmp_path_factory) -> dict[str, DataConfig]:
    """The images in every kind of source: name -> configuration."""
    root = tmp_path_factory.mktemp("packed")
    write_folder(root / "folder", image_files)
    write_tar(root / "shard", image_files)
    write_tfrecord(root / "all.tfrecord", image_files)
    write_parquet(root / "plain.parquet", image_files, compression="none", use_dictionary=False)
    write_parquet(root / "dictionary.parquet", image_files, compression="none")
    write_parquet(root / "struct.parquet", image_files, as_struct=True)
    settings = {"max_quarantined": 0.5, "image_size": 16, "batch_size": 6, "max_text_len": 4}
    settings["caption_lines"] = True
    paths = {
        "folder": ("folder", root / "folder"),
        "tar": ("webdataset", f"{root}/shard-*.tar"),
        "tfrecord": ("tfrecord", root / "all.tfrecord"),
        "plain": ("parquet", root / "plain.parquet"),
        "dictionary": ("parquet", root / "dictionary.parquet"),
        "struct": ("parquet", root / "struct.parquet"),
    }
    return {
        name: DataConfig(kind=kind, path=str(path), **KEYS, **settings)
        for name, (kind, path) in paths.items()
    }


@pytest.fixture(scope="module")
def store(packed, tmp_path_factory) -> EmbeddingStore:
    source = registry.open_source(packed["folder"], log=lambda line: None)
    texts = sorted({text for i in range(len(source)) for text in source.captions(i)})
    return write_store(tmp_path_factory.mktemp("embedded") / "store", texts)


OPTIONS = [
    {},
    {"fit": "random_crop", "flip": True},
    {"image_size": 8, "crop_from": 32, "lowres_size": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "random", "crops"])
@pytest.mark.parametrize("name", ["tar", "tfrecord", "plain", "dictionary", "struct"])
def test_the_same_images_give_the_same_batches(packed, store, name, options):
    streams = []
    for package in ("folder", name):
        data = dataclasses.replace(packed[package], **options)
        source = registry.open_source(data, log=lambda line: None)
        streams.append(Pipeline(source, store, data, seed=3))
    assert len(streams[0].source) == 15
    for step in range(4):
        expected, batch = (stream.batch_at(step) for stream in streams)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value, err_msg=key)


NOTED = {
    "b_animated.gif": "first frame alone (of 2)",
    "b_cmyk.jpg": "converted from CMYK",
    "b_long.png": "long caption (5000 words",
    "b_png_inside.jpg": "wrong extension (.jpg on a PNG)",
    "b_sixteen.png": "converted from 16 bits",
    "b_turned.jpg": "rotated by EXIF",
    "я_кириллица.png": "name not in ASCII",
}
REJECTED = {
    "b_cut.jpg": "unreadable",
    "b_dot.png": "too small (1 px",
    "b_empty.png": "unreadable (empty)",
    "b_silent.png": "no caption",
}


def test_the_report_lists_rejected_records_and_notes(packed, image_files):
    lines = []
    source = registry.open_source(packed["folder"], log=lines.append)
    path = pathlib.Path(packed["folder"].path) / ".imagen_index" / "quarantine.json"
    written = json.loads(path.read_text("utf-8"))
    found = {row["name"]: row["reason"] for row in written["records"]}
    assert found.keys() == REJECTED.keys() and written["total"] == len(image_files)
    noted = {row["name"]: row["note"] for row in written["notes"]}
    assert noted.keys() == NOTED.keys()
    for names, expected in ((found, REJECTED), (noted, NOTED)):
        for name, reason in expected.items():
            assert names[name].startswith(reason), (name, names[name])
    assert "used: " in lines[0] and "1 rotated by EXIF" in lines[0]
    assert source.report.rejected and dict(source.report.rejected).keys() == REJECTED.keys()


@pytest.mark.parametrize("name", ["tar", "tfrecord", "plain", "struct"])
def test_every_kind_applies_the_same_rules(packed, name):
    reasons = []
    for package in ("folder", name):
        report = registry.open_source(packed[package], log=lambda line: None).report
        reasons.append([why for _, why in report.rejected])
        notes = [note for pairs in report.notes.values() for _, note in pairs]
        notes = [
            n
            for n in notes
            if not n.startswith(("name not in", "wrong extension", "caption without"))
        ]
        reasons.append(sorted(notes))
    assert reasons[0] == reasons[2] and reasons[1] == reasons[3]


def test_uncompressed_parquet_is_read_in_place(packed, monkeypatch):
    source = registry.open_source(packed["plain"], log=lambda line: None)
    monkeypatch.setattr(type(source.reader), "_group", None)
    assert len([source.record(i) for i in range(len(source))]) == 15
    assert all(source.table.location(i)[1] >= 0 for i in range(len(source)))
    packed_source = registry.open_source(packed["struct"], log=lambda line: None)
    assert all(packed_source.table.location(i)[1] < 0 for i in range(len(packed_source)))


def test_large_compressed_row_groups_are_reported(packed, monkeypatch, tmp_path, image_files):
    monkeypatch.setattr("imagen_jax.data.sources.parquet.LARGE_ROW_GROUP_BYTES", 1000)
    write_parquet(tmp_path / "snappy.parquet", image_files)
    data = dataclasses.replace(packed["struct"], path=str(tmp_path / "snappy.parquet"))
    report = registry.open_source(data, log=lambda line: None).report
    assert report.noted["compressed row group"] == 15


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "parquet"])
def test_a_truncated_shard_is_reported_and_the_rest_is_used(packed, kind, tmp_path):
    package = {"tfrecord": "tfrecord", "webdataset": "tar", "parquet": "plain"}[kind]
    pattern = pathlib.Path(packed[package].path)
    whole = sorted(pattern.parent.glob(pattern.name))[0]
    suffix = whole.suffix
    (tmp_path / f"0{suffix}").write_bytes(whole.read_bytes())
    (tmp_path / f"1{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    data = dataclasses.replace(packed[package], path=str(tmp_path))
    source = registry.open_source(data, log=lambda line: None)
    alone = dataclasses.replace(data, path=str(tmp_path / f"0{suffix}"))
    whole_count = len(registry.open_source(alone, log=lambda line: None))
    reasons = dict(source.report.rejected)
    expected = "unreadable" if kind == "parquet" else "truncated"
    assert reasons[f"1{suffix}"].startswith(expected)
    assert whole_count <= len(source) < 2 * whole_count
    assert (len(source) > whole_count) == (kind != "parquet")


@pytest.mark.parametrize("name", ["tfrecord", "plain"])
def test_a_wrong_column_names_the_nearest(packed, name):
    data = dataclasses.replace(packed[name], caption_key="wrds")
    with pytest.raises(ConfigError, match="config.data.caption_key='wrds'.*did you mean 'words'"):
        registry.open_source(data)


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "parquet"])
def test_missing_files(kind, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="config.data.path=.*pattern such as"):
            registry.open_source(DataConfig(kind=kind, path=str(path)))


def test_captions_by_the_first_dot_and_any_order_in_a_tar(tmp_path):
    data = encoded(noise(20, 20), "png")
    files = {"a.left.png": data, "b.5.png": data, "c.png": data, "notes.xyz": b"?"}
    files |= {"a.txt": b"first", "b.5.txt": b"second", "c.json": b'{"text": ["third", "more"]}'}
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "d.png"
        shard.addfile(link)
    data = DataConfig(kind="webdataset", path=str(tmp_path / "x.tar"), max_quarantined=0.9)
    source = registry.open_source(data, log=lambda line: None)
    captions = [source.captions(i) for i in range(len(source))]
    assert captions == [("first",), ("second",), ("third", "more")]
    reasons = dict(source.report.rejected)
    assert reasons == {"x.tar/d.png": "no regular file (a link)"}
    assert source.report.ignored == {".xyz files": (1, ["x.tar/notes.xyz"])}


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size."""
    data = bytearray(encoded(noise(20, 20), "png"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_images_with_too_many_pixels_are_rejected(tmp_path):
    write_folder(
        tmp_path / "f",
        {
            "bomb.png": (claiming(10**6, 10**6), ("a bomb",)),
            "large.png": (claiming(10**4, 10**4), ("too large",)),
            "good.png": (encoded(noise(20, 20), "png"), ("good",)),
        },
    )
    data = DataConfig(kind="folder", path=str(tmp_path / "f"), max_quarantined=0.9)
    report = registry.open_source(data, log=lambda line: None).report
    assert all(why.startswith("too large") for _, why in report.rejected)
    assert [name for name, _ in report.rejected] == ["bomb.png", "large.png"]


def test_more_files_than_may_be_open(packed, monkeypatch):
    monkeypatch.setattr("imagen_jax.data.sources.files.MAX_OPEN_FILES", 1)
    source = registry.open_source(packed["tar"], log=lambda line: None)
    first = [source.record(i).image for i in range(len(source))]
    monkeypatch.undo()
    again = registry.open_source(packed["tar"], log=lambda line: None)
    for i, image in enumerate(first):
        np.testing.assert_array_equal(again.record(i).image, image)


def test_the_fingerprint_is_the_one_of_earlier_versions(packed):
    import hashlib

    source = registry.open_source(packed["folder"], log=lambda line: None)
    records = [source.record(i) for i in range(len(source))]
    root = pathlib.Path(packed["folder"].path)
    rows = [[r.key, (root / r.key).stat().st_size, *r.captions] for r in records]
    assert source.fingerprint == hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
