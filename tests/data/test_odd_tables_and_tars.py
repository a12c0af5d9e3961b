"""Tables, text files and tar files that are nearly what readers expect."""

import dataclasses
import gzip
import io
import json
import pathlib
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig, SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.sources.parquet import ParquetReader
from imagen_jax.data.sources.registry import open_source


def image(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


PNG = image()


def opened(path: pathlib.Path, kind: str = "folder"):
    config = dataclasses.replace(
        DataConfig(), kind=kind, path=str(path), loader="numpy", max_quarantined=0.99
    )
    return open_source(config)


def captions(source) -> dict[str, tuple[str, ...]]:
    return {source.record(i).key: source.captions(i) for i in range(len(source))}


@pytest.mark.parametrize(
    ("name", "content", "caption"),
    [
        ("csv", "sep=;\nfile_name;text\ns/a.png;a red, round ball\n", "a red, round ball"),
        ("csv", ' "file_name" , "text" \ns/a.png,a ball\n', "a ball"),
        ("csv", 'file_name, text\ns/a.png, "a red, round ball"\n', "a red, round ball"),
        ("csv", 'file_name,text\ns/a.png, "a" ball\n', '"a" ball'),
        ("csv", "file_name,text,caption\ns/a.png,,a ball\n", "a ball"),
        ("jsonl", '{"file_name": "s/a.png", "text": null, "caption": "a ball"}', "a ball"),
        ("jsonl", '{"file_name": "s/a.png", "text": " ", "prompt": "a ball"}', "a ball"),
        ("jsonl", '{"file_name": "s/a.png", "text": ["", null], "caption": ["a ball"]}', "a ball"),
        ("jsonl", '{"file_name": "ROOT/s/a.png", "text": "a ball"}', "a ball"),
    ],
)
def test_tables(tmp_path, name, content, caption):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.png").write_bytes(PNG)
    (tmp_path / f"metadata.{name}").write_text(content.replace("ROOT", str(tmp_path)))
    source = opened(tmp_path)
    assert captions(source) == {"s/a.png": (caption,)} and not source.report.rejected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"file_name": "a.png", "text": "two"},', "bad row (not JSON: Extra data"),
        (
            '{"file_name": "a.png", "text": "two", "n": ' + "1" * 5000 + "}",
            "bad row (not JSON: Exceeds",
        ),
        ('["a.png", "two"]', "bad row (no JSON object)"),
    ],
)
def test_a_line_that_is_no_json_says_why(tmp_path, row, says):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image(ord(name)))
    good = json.dumps({"file_name": "b.png", "text": "a ball"})
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{row}\n")
    source = opened(tmp_path)
    assert captions(source) == {"b.png": ("a ball",)}
    assert dict(source.report.rejected)["metadata.jsonl:2"].startswith(says)


def test_a_quote_that_is_never_closed_is_no_caption(tmp_path):
    """The rest of the table would be the caption of one image."""
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(image(ord(name)))
    rows = ["file_name,text", 'a.png,"one, and\n two"', 'b.png,"three', "c.png,four"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one, and\n two",)}
    reasons = dict(source.report.rejected)
    assert reasons["b.png"] == "bad row (a quote that is never closed)"
    assert reasons["c.png"] == "no caption"


def test_more_captions_than_an_image_can_have(tmp_path, monkeypatch):
    """A table may name one image a million times; each row takes as long as the first."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image(ord(name)))
    row = json.dumps({"file_name": "a.png", "text": "a ball"})
    table = "\n".join([row] * 30_000 + [row.replace("a.png", "b.png")] * 9)
    (tmp_path / "metadata.jsonl").write_text(table)
    begin = time.process_time()
    source = opened(tmp_path)
    assert time.process_time() - begin < 10
    assert captions(source) == {"b.png": ("a ball",) * 9}
    assert source.report.rejected == [("a.png", "too many captions (more than 10,000)")]


def test_captions_of_gigabytes_in_a_table_of_a_kilobyte(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.png").write_bytes(PNG)
    repeated = pyarrow.DictionaryArray.from_arrays(np.zeros(1000, np.int32), ["word " * 200_000])
    table = pyarrow.table({"file_name": ["a.png"] * 1000, "text": repeated})
    parquet.write_table(table, tmp_path / "metadata.parquet", compression="zstd")
    assert (tmp_path / "metadata.parquet").stat().st_size < 3000
    tracemalloc.start()
    with pytest.raises(ConfigError, match="caption too long"):
        opened(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20  # Of a gigabyte.


@pytest.mark.parametrize("as_struct", [False, True])
def test_images_of_gigabytes_in_a_file_of_kilobytes(tmp_path, as_struct):
    """Pages that repeat one image: it is decompressed once."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    padded = PNG + b"\0" * (1 << 20)
    images = pyarrow.DictionaryArray.from_arrays(np.zeros(200, np.int32), [padded])
    if as_struct:
        images = pyarrow.StructArray.from_arrays([images.cast(pyarrow.binary())], ["bytes"])
    table = pyarrow.table({"image": images, "text": ["a ball"] * 199 + [None]})
    del images
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    del table
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    begin = pyarrow.total_allocated_bytes()
    source = SourceConfig(kind="parquet", path=str(tmp_path), caption_key="text", check="header")
    reader = ParquetReader(source)
    items = list(reader.scan())
    assert len(items) == 200 and not items[-1].captions
    assert reader.read(items[5].key, items[5].location) == padded
    assert pyarrow.total_allocated_bytes() - begin < 64 << 20


@pytest.mark.parametrize("content", [b"[1]", b'{"caption": ' + b"[" * 50_000, b'{"caption": "a'])
def test_a_json_that_cannot_be_read_says_so(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(
        tar(("0.png", PNG), ("0.json", content), ("1.png", image(1)), ("1.json", b'{"text": "a"}'))
    )
    source = opened(tmp_path, kind="webdataset")
    assert captions(source) == {"x.tar/1.png": ("a",)}
    assert source.report.rejected == [("x.tar/0.png", "caption unreadable (no JSON object)")]


@pytest.mark.parametrize(
    "value", [["one", ["two"]], ["one", {"en": "two"}], ["one", 2], ["one", None]]
)
def test_what_is_no_text_in_a_list_is_no_caption(tmp_path, value):
    (tmp_path / "a.png").write_bytes(PNG)
    row = json.dumps({"file_name": "a.png", "text": value})
    (tmp_path / "metadata.jsonl").write_text(row)
    assert captions(opened(tmp_path)) == {"a.png": ("one",)}


def test_the_column_that_is_named_is_never_replaced(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(image(1))
    rows = [{"file_name": "a.png", "text": "alt", "long": None}]
    rows.append({"file_name": "b.png", "text": "alt", "long": "a ball"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(
        DataConfig(), kind="folder", path=str(tmp_path), caption_key="long", max_quarantined=0.9
    )
    source = open_source(config)
    assert captions(source) == {"b.png": ("a ball",)}
    assert source.report.rejected == [("a.png", "no caption")]


def test_characters_without_a_width_are_no_caption(tmp_path):
    for name, text in {"a": "\u200b\u200b\ufeff", "b": "\u00a0\u3000", "c": "\u200ba ball"}.items():
        (tmp_path / f"{name}.png").write_bytes(image(ord(name)))
        (tmp_path / f"{name}.txt").write_text(text)
    source = opened(tmp_path)
    assert captions(source) == {"c.png": ("\u200ba ball",)}
    assert [reason for _, reason in source.report.rejected] == ["empty caption"] * 2


def tar(*files: tuple[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as shard:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return stream.getvalue()


LONG = "x" * 120  # Its header is not a plain one.


@pytest.mark.parametrize("start", ["", LONG])
def test_samples_of_one_name_keep_their_own_captions(tmp_path, start):
    files = [("0.png", PNG), ("0.txt", b"a"), ("1.png", image(1)), ("1.txt", b"b")]
    files += [("0.png", image(2)), ("0.txt", b"c")]
    (tmp_path / "x.tar").write_bytes(tar(*((start + name, data) for name, data in files)))
    source = opened(tmp_path / "x.tar", "webdataset")
    assert [source.captions(i) for i in range(3)] == [("a",), ("b",), ("c",)]
    np.testing.assert_array_equal(
        source.record(2).image, np.asarray(Image.open(io.BytesIO(image(2))))
    )
    assert source.report.noted["several samples of this name"] == 2


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: b"PK\3\4" + data])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_compressed_tar_says_so(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(tar(("0.png", PNG), ("0.txt", b"a"))))
    with pytest.raises(ConfigError, match=r"x.tar.*: compressed \((gzip|zip); unpack it first"):
        opened(tmp_path / name, "webdataset")


@pytest.mark.parametrize("start", ["", LONG])
def test_what_follows_the_end_of_a_tar_is_reported(tmp_path, start):
    first, second = tar((f"{start}0.png", PNG), (f"{start}0.txt", b"a")), tar(("1.png", image(1)))
    (tmp_path / "x.tar").write_bytes(first + second)
    source = opened(tmp_path / "x.tar", "webdataset")
    assert list(captions(source).values()) == [("a",)]
    ((_, reason),) = source.report.rejected
    assert reason.startswith("data after its end (")
    (tmp_path / "y.tar").write_bytes(first)
    assert not opened(tmp_path / "y.tar", "webdataset").report.rejected
