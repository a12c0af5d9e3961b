"""Names of files: junk, sidecars, tables that do not fit, keys of webdataset, Tux Paint."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.sources import names, registry
from imagen_jax.io import images
from tests.reference.odd_folder import encode

JPEG = encode(0)


def folder(path, files, **options):
    """The source of a folder with these files: name -> content."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    options = {"kind": "folder", "max_quarantined": 0.9, **options}
    return registry.open_source(DataConfig(path=str(path), **options), log=lambda line: None)


def shard(path, files, **options):
    """The source of a tar file with these members."""
    with tarfile.open(path / "0.tar", "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    options = {"kind": "webdataset", "max_quarantined": 0.9, **options}
    return registry.open_source(DataConfig(path=str(path), **options), log=lambda line: None)


def captions(source):
    return {
        source.record(i).key.removeprefix("0.tar/"): source.captions(i) for i in range(len(source))
    }


JUNK = [
    *("Thumbs.db", "ehthumbs_vista.db", "Desktop.ini", "a.jpg:Zone.Identifier", "a.lnk", "~$a.doc"),
    *(
        ".DS_Store",
        "._a.jpg",
        "Icon\r",
        "__MACOSX/x/._a.jpg",
        ".Spotlight-V100/a",
        ".Trashes/b.jpg",
    ),
    *("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "a.jpg.part", "a.crdownload", ".a.jpg.icloud"),
    *(
        "a.sync-conflict-20240102-030405-ABCDEF.jpg",
        "a (Case Conflict 1).jpg",
        "~syncthing~a.jpg.tmp",
        "a.jpg.!sync",
    ),
    *("a (Anna's conflicted copy 2024-01-02).jpg", "$RECYCLE.BIN/$R1.jpg", "IMG_1.aae", "b.jpg~"),
    *("System Volume Information/IndexerVolumeGuid", "sub/thumbs.db", "a.jpg_original"),
]
NO_JUNK = [
    "a case conflict.jpg",
    "a.jpg",
    "~a.jpg",
    "icon.png",
    "thumbs.jpg",
    "syncthing.jpg",
    "a.b.c",
    "desktop.jpg",
]


@pytest.mark.parametrize("name", [*JUNK, *(name.replace("/", "\\") for name in JUNK)])
def test_junk(name):
    assert names.is_junk(name)


@pytest.mark.parametrize("name", NO_JUNK)
def test_names_that_are_no_junk(name):
    assert not names.is_junk(name)


@pytest.mark.parametrize("read", [folder, shard])
def test_junk_is_counted_apart_and_never_a_record(read, tmp_path):
    files = {"a.jpg": JPEG, "a.txt": "a caption", **dict.fromkeys(JUNK, JPEG)}
    source = read(tmp_path, files)
    assert captions(source) == {"a.jpg": ("a caption",)}
    assert source.report.rejected == [] and source.report.total == 1
    (kind, (count, first)) = next(iter(source.report.ignored.items()))
    assert kind == "junk" and count >= len({name.split("/")[0] for name in JUNK}) - 1
    assert len(first) == 5 and "ignored: " in source.report.summary()


@pytest.mark.parametrize(
    ("image", "sidecar"),
    [
        *(("a.jpg", name) for name in ("a.txt", "a.TXT", "a.caption", "a.text", "a.jpg.txt")),
        *(("A.JPG", name) for name in ("A.txt", "a.txt", "A.JPG.txt", "A.jpg.Caption", "A.Txt")),
        *(("d e/a.b.jpeg", f"d e/a.b{end}") for end in (".txt", ".jpeg.txt", ".caption")),
        *(("T\u00f6.jpg", name) for name in ("To\u0308.txt", "To\u0308.jpg.txt")),
        *(("To\u0308.jpg", name) for name in ("T\u00f6.txt", "t\u00f6.caption")),
    ],
)
def test_sidecars(image, sidecar, tmp_path):
    source = folder(tmp_path, {image: JPEG, sidecar: "a caption"})
    assert captions(source) == {image: ("a caption",)} and not source.report.ignored


def test_names_that_differ_in_case_alone_stay_apart(tmp_path):
    files = {"A.jpg": JPEG, "a.jpg": JPEG, "A.txt": "large", "a.txt": "small"}
    assert captions(folder(tmp_path, files)) == {"A.jpg": ("large",), "a.jpg": ("small",)}


def test_the_file_of_one_image_comes_before_that_of_its_name(tmp_path):
    files = {"a.jpg": JPEG, "a.png": encode(1, "PNG"), "a.jpg.txt": "the JPEG", "a.txt": "both"}
    assert captions(folder(tmp_path, files)) == {"a.jpg": ("the JPEG",), "a.png": ("both",)}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("read", [folder, shard])
def test_a_text_file_is_one_caption_unless_asked(read, lines, tmp_path):
    files = {"a.jpg": JPEG, "a.txt": "a red\r\n\r\n circle \n", "b.jpg": JPEG, "b.txt": "one"}
    source = read(tmp_path, files, caption_lines=lines)
    expected = ("a red", "circle") if lines else ("a red\n\n circle",)
    assert captions(source) == {"a.jpg": expected, "b.jpg": ("one",)}
    assert source.report.captions == ({1: 1, 2: 1} if lines else {1: 2})
    assert source.report.noted == ({} if lines else {"caption of several lines": 1})


@pytest.mark.parametrize("field", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "METADATA.CSV"])
@pytest.mark.parametrize("file_name", ["s/a.jpg", "s\\a.JPG", "./s/a.jpg", "s/../s/a.jpg"])
def test_tables(name, field, file_name, tmp_path):
    if name.endswith("jsonl"):
        content = json.dumps({"file_name": file_name, field: "a caption"})
    else:
        content = f'file_name,{field.title()}\n"{file_name}","a caption"\n'
    source = folder(tmp_path, {"s/a.jpg": JPEG, name: content})
    assert captions(source) == {"s/a.jpg": ("a caption",)} and not source.report.rejected


def test_a_table_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"file_name": ["a.jpg", "gone.jpg"], "prompt": ["a caption", "x"]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    source = folder(tmp_path, {"a.jpg": JPEG})
    assert captions(source) == {"a.jpg": ("a caption",)}
    assert source.report.rejected == [("metadata.parquet:2", "missing file (gone.jpg)")]


def test_an_explicit_column_comes_before_all_others(tmp_path):
    files = {"a.jpg": JPEG, "a.txt": "alt", "b.jpg": JPEG, "b.txt": "alt"}
    files["metadata.csv"] = "file_name,text,Recaption\na.jpg,alt,new\n"
    source = folder(tmp_path, files, caption_key="Recaption")
    assert captions(source) == {"a.jpg": ("new",), "b.jpg": ("alt",)}


def test_a_column_without_a_name_is_no_caption(tmp_path):
    files = {"a.jpg": JPEG, "metadata.csv": "file_name,text,\na.jpg,a caption,\n"}
    assert captions(folder(tmp_path, files)) == {"a.jpg": ("a caption",)}


def test_one_bad_row_rejects_its_image_alone(tmp_path):
    rows = "file_name,text\na.jpg,a red, round ball\nb.jpg,a ball\nc.jpg,nul\0\n"
    source = folder(tmp_path, {**{f"{n}.jpg": JPEG for n in "abc"}, "metadata.csv": rows})
    assert captions(source) == {"b.jpg": ("a ball",)}
    said = dict(source.report.rejected)
    assert said["a.jpg"].startswith("bad row (3 fields under a header of 2")
    assert said["c.jpg"] == "caption with a NUL character" and len(said) == 2


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.xml": "x", "b.xml": "x"}, "2 .xml files"),
        ({"a.mp4": "x"}, "holds no images; seen: 1 .mp4 files"),
        ({"a.jpg": JPEG, "a.xml": "x"}, "seen: 1 .xml files; captions are read from NAME.txt"),
        ({"a.jpg": JPEG, "labels.json": "{}"}, "seen: 1 .json files"),
        ({"a.jpg": JPEG, "metadata.csv": "image,label\na.jpg,1\n"}, "the row has image, label"),
    ],
)
def test_when_nothing_fits_the_message_lists_what_was_seen(files, says, tmp_path):
    with pytest.raises(ConfigError) as error:
        folder(tmp_path, files)
    assert says in str(error.value)


def test_shards_of_one_name_have_keys_that_move_with_the_data(tmp_path, monkeypatch):
    """And the records that are held out, which follow the keys."""
    data = tmp_path / "one" / "data"
    for part in "ab":
        (data / part).mkdir(parents=True)
        files = {f"{part}{n}.jpg": encode(n) for n in range(3)}
        shard(data / part, files | {f"{part}{n}.txt": "a caption" for n in range(3)})
    shutil.copytree(data, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "one")
    sources = [
        registry.open_source(DataConfig(kind="webdataset", path=str(path)), log=lambda line: None)
        for path in (data, "data", tmp_path / "moved")
    ]
    keys = [[source.record(n).key for n in range(6)] for source in sources]
    assert keys[0] == keys[1] == keys[2] and keys[0][0].startswith("a/0.tar/")
    assert len({source.fingerprint for source in sources}) == 1


def test_dates_in_the_names_of_a_shard(tmp_path):
    files = {f"2024.{k:02}.05.jpg": JPEG for k in range(1, 5)}
    files |= {f"2024.{k:02}.05.txt": f"number {k}" for k in range(2, 5)}
    files |= {"v1.2/x.jpg": JPEG, "v1.3/x.txt": "of another folder", "2024.01.06.txt": "none"}
    source = shard(tmp_path, files)
    assert captions(source) == {f"2024.{k:02}.05.jpg": (f"number {k}",) for k in range(2, 5)}
    assert dict(source.report.rejected) == {
        "0.tar/2024.01.05.jpg": "no caption",
        "0.tar/v1.2/x.jpg": "no caption",
    }
    assert source.report.ignored["text files without an image"][0] == 2


IMG2DATASET = {
    "00000.jpg": JPEG,
    "00000.txt": "alt text",
    "00000.json": '{"caption": "alt text", "recaption": "a new caption", "key": "00000"}',
    "00001.JPG": JPEG,
    "00001.TXT": "alt 1",
    "00001.json": '{"caption": "alt 1", "recaption": ["one", "two"]}',
    "00002.json": '{"caption": null, "status": "failed_to_download"}',
}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("caption", [("alt text",), ("alt 1",)]),
        ("recaption", [("a new caption",), ("one", "two")]),
        ("txt", [("alt text",), ("alt 1",)]),
        ("missing", [("alt text",), ("alt 1",)]),
    ],
)
def test_a_shard_of_img2dataset(tmp_path, key, expected):
    source = shard(tmp_path, IMG2DATASET, caption_key=key)
    assert list(captions(source).values()) == expected and not source.report.rejected
    noted = {"caption without 'missing'": 2} if key == "missing" else {}
    assert source.report.noted == noted


PAIRS = {
    "p/0.input.jpg": encode(1),
    "p/0.output.jpg": encode(2),
    "p/0.edit.txt": "make it red",
    "p/0.txt": "plain",
    "p/1.output.JPG": encode(3),
    "p/1.input.jpg": encode(4),
    "p/1.edit.txt": "make it blue",
    "p/2.jpg": encode(5),
    "p/2.txt": "no edit",
}


@pytest.mark.parametrize("image_key", ["output.jpg", "output", ".output.jpg"])
@pytest.mark.parametrize("caption_key", ["edit.txt", "edit"])
def test_parts_of_a_sample_by_their_keys(tmp_path, image_key, caption_key):
    source = shard(tmp_path, PAIRS, image_key=image_key, caption_key=caption_key)
    expected = {"p/0.output.jpg": ("make it red",), "p/1.output.JPG": ("make it blue",)}
    assert captions(source) == expected
    assert [key for key, _ in source.report.rejected] == ["0.tar/p/2.jpg"]


def test_every_image_of_a_sample_without_keys(tmp_path):
    source = shard(tmp_path, PAIRS)
    found = captions(source)
    assert found["p/0.input.jpg"] == found["p/0.output.jpg"] == ("plain",)
    assert "p/1.output.JPG" not in found and found["p/2.jpg"] == ("no edit",)


@pytest.fixture
def stamps(tmp_path):
    """A look-alike of Debian's tuxpaint-stamps-default, in small."""
    files = {}
    for i in range(12):
        name = f"animals/birds/bird_{i}"
        files[f"{name}.png"] = encode(i, "PNG", side=70 if i else 30)
        lines = [f"A bird, number {i}.", "af.utf8='n Voël", "de.utf8=Ein Vogel.", "zh_CN.utf8=鸟"]
        files[f"{name}.txt"] = "\n".join([*lines, "ca@valencia.utf8=Un ocell", "el.utf8=Πουλί", ""])
        files |= {f"{name}_desc_{language}.ogg": b"OggS" for language in ("de", "fr", "ru")}
        files[f"{name}.dat"] = "nomirror\nnoflip"
    files |= {"seasonal/tree.svg": "<svg/>", "seasonal/tree.txt": "A tree.\nde.utf8=Ein Baum.\n"}
    folder(tmp_path / "stamps", files)
    return tmp_path / "stamps"


def test_multilingual_stamps_need_one_override(stamps, capsys):
    flags = ["prepare", "--config=configs/folder.py:base", f"--config.data.path={stamps}"]
    flags += ["--config.mesh.cpu_devices=1"]  # The devices of this process stay.
    assert main.main(flags) == 1
    assert "1 of 12" in capsys.readouterr().err
    assert main.main([*flags, "--config.data.min_size=16"]) == 0
    out = capsys.readouterr().out
    assert "12 usable images" in out and "captions per image: 12 images with 1" in out
    assert "36 .ogg files" in out and "12 translations left out" in out
    data = DataConfig(kind="folder", path=str(stamps))
    source = registry.open_source(data, log=lambda line: None)
    assert {source.captions(i) for i in range(12)} == {(f"A bird, number {i}.",) for i in range(12)}


def test_heic_without_its_plugin_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_formats", lambda: images.FORMATS)
    data = b"\0\0\0\x1cftypheic" + bytes(100)
    source = folder(tmp_path, {"a.HEIC": data, "a.txt": "x", "b.jpg": JPEG, "b.txt": "x"})
    assert dict(source.report.rejected) == {"a.HEIC": "wrong type (HEIC; install pillow-heif)"}


def test_a_grid_stays_small_under_long_captions():
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    sheet = images.grid(pixels, 2, ["red " * 5000, "x" * 3000], scale=2)
    assert sheet.shape[0] < 32 + 16 * images.MAX_CAPTION_LINES
