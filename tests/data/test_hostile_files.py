"""Folders and archives of strangers: links, pipes, checksums and headers that lie."""

import io
import os
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index import folders, scan
from imagen_jax.data.sources import files
from imagen_jax.data.sources.folder import Folder, list_files
from imagen_jax.data.sources.registry import SOURCES
from imagen_jax.io.images import ImageError
from tests.reference.tfrecords import example, record


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder of four captioned images, and a secret outside it."""
    root = tmp_path / "root"
    (root / "deep" / "deeper").mkdir(parents=True)
    for i, where in enumerate((root, root, root / "deep", root / "deep" / "deeper")):
        (where / f"{i}.png").write_bytes(png(i))
        (where / f"{i}.txt").write_text(f"number {i}")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes(png(9))
    (secret / "s.txt").write_text("secret")
    return root


USABLE = ["0.png", "1.png", "deep/2.png", "deep/deeper/3.png"]


def index(root, kind: str = "folder") -> tuple[list[str], dict[str, str]]:
    """Keys of the usable records, and the reason for every rejected one."""
    source = SourceConfig(kind=kind, path=str(root))
    table, report = scan.build(SOURCES[kind](source), source)
    return sorted(table.key(i) for i in range(len(table))), dict(report.rejected)


LINKS = {
    "a folder outside": ("out", "../secret", "symlink out of the folder"),
    "a file outside": ("out.png", "../secret/s.png", "symlink out of the folder"),
    "an absolute one": ("etc", "/etc", "symlink out of the folder"),
    "the root's parent": ("up", "..", "symlink out of the folder"),
    "a neighbour with the same beginning": ("near", "../rootless", "symlink out of the folder"),
    "the root": ("deep/again", "..", "symlink loop"),
    "itself": ("self.png", "self.png", "symlink loop"),
    "nothing": ("gone.png", "nowhere.png", "unreadable (No such file or directory)"),
    "a folder inside": ("twice", "deep", None),
    "a folder inside, deeper": ("deep/twice", "../deep/deeper", None),
}


@pytest.mark.parametrize("name", LINKS)
def test_links(folder, name):
    place, target, fault = LINKS[name]
    if name.startswith("a neighbour"):
        (folder.parent / "rootless").mkdir()
        (folder.parent / "rootless" / "x.png").write_bytes(png())
    (folder / place).symlink_to(target)
    keys, rejected = index(folder)
    assert keys == USABLE
    assert rejected == ({place: fault} if fault else {})


def test_a_chain_of_links_and_a_root_that_is_a_link(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("../secret")
    (folder.parent / "link").symlink_to("root")
    keys, rejected = index(folder.parent / "link")
    assert keys == USABLE
    assert set(rejected.values()) == {"symlink out of the folder"} and set(rejected) == {"a", "b"}


def test_many_links_to_each_other_end_soon(folder):
    """Folders that link to each other have exponentially many paths."""
    for i in range(12):
        (folder / f"d{i}").mkdir()
    for i in range(12):
        for j in range(12):
            if i != j:
                (folder / f"d{i}" / f"to{j}").symlink_to(f"../d{j}")
    (folder / "d0" / "x.png").write_bytes(png())
    files = list_files(folder)
    assert [file.name for file in files if file.name.endswith("x.png")] == ["d0/x.png"]
    assert len(files) < 200


@pytest.mark.parametrize("name", ["pipe.png", "pipe.txt", "pipe", "pipe.jsonl"])
def test_a_pipe_is_not_read(folder, name):
    """Opening a pipe waits for its writer."""
    os.mkfifo(folder / name)
    found = []
    thread = threading.Thread(target=lambda: found.append(index(folder)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert found, "the index waits for a pipe"
    assert found[0] == (USABLE, {name: "no regular file"})


def test_a_device_is_not_read(folder):
    (folder / "zero.png").symlink_to("/dev/zero")
    assert index(folder)[1] == {"zero.png": "symlink out of the folder"}


def test_captions_outside_the_folder_are_not_read(folder):
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("../secret/s.txt")
    reader = Folder(SourceConfig(kind="folder", path=str(folder)))
    captions = {item.key: item.captions for item in reader.scan()}
    assert captions["0.png"] == ()
    assert "secret" not in repr(captions.values())


def records() -> list[bytes]:
    return [record(example(png(i), f"number {i}".encode())) for i in range(4)]


def test_the_checksum_is_tensorflows(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for i in range(4):
            writer.write(example(png(i), f"number {i}".encode()))
    assert (tmp_path / "theirs").read_bytes() == b"".join(records())


@pytest.mark.parametrize("at", [0, 3, 8, 11])
def test_a_damaged_length_ends_the_file(tmp_path, at):
    """A length that still fits the file would put all later records at wrong places."""
    whole = records()
    damaged = bytearray(whole[1])
    damaged[at] ^= 1
    path = tmp_path / "x.tfrecord"
    path.write_bytes(whole[0] + bytes(damaged) + whole[2] + whole[3])
    keys, rejected = index(path, "tfrecord")
    assert keys == ["x.tfrecord__0"]
    (reason,) = rejected.values()
    assert reason.startswith("truncated (only 1 records are used") and "damaged" in reason


@pytest.mark.parametrize("where", ["image", "caption", "checksum", "name"])
def test_a_damaged_body_rejects_that_record_alone(tmp_path, where):
    whole = records()
    at = {"caption": whole[1].index(b"number"), "name": whole[1].index(b"image"), "checksum": -2}
    at["image"] = whole[1].index(b"IDAT") + 100
    damaged = bytearray(whole[1])
    damaged[at[where]] ^= 4
    path = tmp_path / "x.tfrecord"
    path.write_bytes(whole[0] + bytes(damaged) + whole[2] + whole[3])
    keys, rejected = index(path, "tfrecord")
    assert keys == [f"x.tfrecord__{i}" for i in (0, 2, 3)]
    assert rejected == {"x.tfrecord__1": "damaged record (checksum)"}


PAYLOADS = {
    "no message": b"\xff" * 40,
    "endless number": b"\x08" + b"\x80" * 100_000,
    "a field beyond its end": b"\x0a\xff\x01abc",
    "a group": b"\x0b" * 10,
    "text": b"hello world, this is no Example",
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_record_that_is_no_example(tmp_path, name):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(records()[0] + record(PAYLOADS[name]) + records()[1])
    keys, rejected = index(path, "tfrecord")
    assert keys == ["x.tfrecord__0", "x.tfrecord__2"]
    assert rejected["x.tfrecord__1"].startswith("damaged record (")


def tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124:136] = b"0000644\0", size.ljust(12, b"\0")
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def member(name: str, content: bytes) -> bytes:
    size = b"%011o\0" % len(content)
    return tar_header(name.encode(), size) + content + b"\0" * (-len(content) % 512)


HEADERS = {
    "a size beyond the file": tar_header(b"b.png", b"77777777777\0"),
    "a negative size": tar_header(b"b.png", b"\xff" * 12),
    "a negative size that leads back": tar_header(b"b.png", b"\xff" * 10 + b"\xfc\x00"),
    "a long name of 4 MB": tar_header(b"L", b"%011o\0" % (4 << 20), b"L") + b"x" * (4 << 20),
    "a PAX header of 4 MB": tar_header(b"x", b"%011o\0" % (4 << 20), b"x") + b"9 a=b\n" * 700_000,
    "a PAX size that is no number": tar_header(b"x", b"%011o\0" % 13, b"x")
    + b"13 size=abcd\n".ljust(512, b"\0"),
    "a negative PAX size": tar_header(b"x", b"%011o\0" % 12, b"x")
    + b"12 size=-99\n".ljust(512, b"\0"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_tar_header_that_lies_ends_the_shard(tmp_path, name):
    good = member("a.png", png()) + member("a.txt", b"first")
    path = tmp_path / "x.tar"
    path.write_bytes(good + HEADERS[name] + member("c.png", png(2)) + b"\0" * 1024)
    found = []
    thread = threading.Thread(target=lambda: found.append(index(path, "webdataset")), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert found, "the index does not end"
    keys, rejected = found[0]
    assert "x.tar/a.png" in keys
    assert any(reason.startswith("truncated") for reason in rejected.values()) or keys == [
        "x.tar/a.png"
    ]


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for kind, name in ((tarfile.SYMTYPE, "s.png"), (tarfile.LNKTYPE, "h.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            shard.addfile(info)
    keys, rejected = index(tmp_path / "x.tar", "webdataset")
    assert keys == [] and set(rejected.values()) == {"no regular file (a link)"}


def grow(path, start: bytes, size: int) -> None:
    """A sparse file of `size` bytes, most of which take no space on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("start", [png(), b"\xff\xd8\xff", b"\0"], ids=["png", "jpeg", "zeros"])
def test_an_image_file_of_terabytes_is_not_read(folder, check, start):
    grow(folder / "huge.jpg", start, 1 << 40)
    (folder / "huge.txt").write_text("a hole")
    source = SourceConfig(kind="folder", path=str(folder), check=check)
    reader = Folder(source)
    table, report = scan.build(reader, source)
    assert len(table) == 4
    assert dict(report.rejected)["huge.jpg"].startswith("too large (1,099,511,627,776 bytes")
    with pytest.raises(ImageError, match="too large"):  # An image that grew after the index pass.
        reader.read("huge.jpg", (0, 0, 0))


@pytest.mark.parametrize(
    ("part", "fault"), [("1.json", "caption too long"), ("1.png", "too large")]
)
def test_a_member_of_gigabytes_rejects_that_sample_alone(tmp_path, part, fault):
    other = {"1.json": member("1.png", png(1)), "1.png": member("1.txt", b"huge")}[part]
    start = member("0.png", png()) + member("0.txt", b"first") + other
    start += tar_header(part.encode(), b"%011o\0" % (7 << 30))
    grow(tmp_path / "x.tar", start, len(start) + (7 << 30) + 1024)
    keys, rejected = index(tmp_path / "x.tar", "webdataset")
    assert keys == ["x.tar/0.png"]
    assert rejected["x.tar/1.png"].startswith(fault)


def test_a_read_that_the_system_divides(tmp_path, monkeypatch):
    """Linux reads at most 2 GiB at once: a row group of Parquet may have more."""
    content = np.random.default_rng(0).bytes(5000)
    (tmp_path / "a").write_bytes(content)
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: whole(fd, min(size, 700), at))
    found = files.Files([tmp_path / "a"])
    assert found.read(0, 100, 4000) == content[100:4100]
    with pytest.raises(ImageError, match="shorter"):
        found.read(0, 4000, 2000)


def test_an_index_without_a_home_is_found_again(tmp_path, monkeypatch):
    """Read-only data and no home folder, as in a container: one place for all commands."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    (tmp_path / "data" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    access = os.access
    data = str(tmp_path / "data")
    monkeypatch.setattr(os, "access", lambda p, m: not str(p).startswith(data) and access(p, m))
    source = SourceConfig(kind="folder", path=data)
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        first = scan.cached_index(Folder(source), source)
    monkeypatch.setattr(scan, "_build_index", lambda *_: pytest.fail("the index is built again"))
    second = scan.cached_index(Folder(source), source)
    assert first[2] == second[2] and first[2].is_relative_to(tmp_path / "tmp")
    assert not (tmp_path / "~").exists()
