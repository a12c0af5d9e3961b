"""Tables, text files and tar files that are nearly what readers expect."""

import dataclasses
import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
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
