"""Atomic writes: complete or absent, without losing the previous result."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from imagen_jax.io import atomic


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "new" / "card.json"
    atomic.write_json(path, {"fid": 1.5})
    with pytest.raises(KeyboardInterrupt), atomic.file(path) as temporary:
        temporary.write_text("half of")
        assert json.loads(path.read_text()) == {"fid": 1.5}
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"fid": 1.5}
    atomic.write_text(path, "naïve \udcff", errors="backslashreplace")
    assert path.read_text("utf-8") == "naïve \\udcff"
    assert [p.name for p in path.parent.iterdir()] == ["card.json"]


def test_a_folder_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "stage"
    for name in ("old", "new"):
        with atomic.folder(path) as temporary:
            (temporary / name).touch()
        assert [p.name for p in path.iterdir()] == [name]
    with pytest.raises(ValueError, match="no room"), atomic.folder(path) as temporary:
        (temporary / "half").touch()
        raise ValueError("no room")
    assert [p.name for p in tmp_path.rglob("*")] == ["stage", "new"]


def test_only_an_earlier_result_of_the_same_kind_is_replaced(tmp_path):
    def free(name):
        return atomic.check_replaceable(str(tmp_path / name), "params.safetensors", "stage folder")

    for name in ("empty", "stage", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "stage" / "params.safetensors").touch()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    for name in ("new", "empty", "stage"):
        assert free(name) == tmp_path / name
    for name in ("photos", "file"):
        with pytest.raises(atomic.OutputError, match=f"{name} exists and is no stage folder"):
            free(name)


def names(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_writers_of_one_file_do_not_collide(tmp_path):
    path = tmp_path / "card.json"
    with atomic.file(path) as one, atomic.file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # The outer context ends last.
    assert names(tmp_path) == ["card.json"]


def test_writers_of_one_folder_do_not_collide(tmp_path):
    path = tmp_path / "stage"
    with atomic.folder(path) as one, atomic.folder(path) as other:
        (one / "one").touch()
        (other / "other").touch()
    assert names(tmp_path) == ["stage", "stage/one"]


WRITERS = """
import sys, threading
from imagen_jax.io import atomic

path, word, exchange = sys.argv[1:]

def refuse(one, other):
    raise OSError

if exchange == "False":
    atomic._exchange = refuse

def write(word):
    for _ in range(40):
        with atomic.folder(path) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(word)
        atomic.write_text(path + ".json", word * 1000)

thread = threading.Thread(target=write, args=[word])
thread.start()
write(word.upper())
thread.join()
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_processes_and_threads_that_write_one_path(tmp_path, exchange):
    """No reader sees a partial result; with an exchange, the folder is never absent."""
    path = tmp_path / "stage"
    with atomic.folder(path) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text("0")
    atomic.write_text(f"{path}.json", "0" * 1000)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITERS, str(path), word, str(exchange)])
        for word in "xy"
    ]
    absent = 0
    while any(writer.poll() is None for writer in writers):
        text = (tmp_path / "stage.json").read_text()
        assert text == text[0] * 1000
        try:
            folder = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            absent += 1
            continue
        # A folder that was replaced after it was opened is being removed: it may lack files.
        with contextlib.suppress(FileNotFoundError):
            assert len({read_at(folder, "a"), read_at(folder, "b")}) == 1
        os.close(folder)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert not (exchange and absent)
    assert names(tmp_path) == ["stage", "stage.json", "stage/a", "stage/b"]


def read_at(folder: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(file, 9)
    finally:
        os.close(file)


KILLED = """
import os, signal, sys
from imagen_jax.io import atomic

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

step, kind, path = sys.argv[1:]
if step == "before":  # the new one is complete and has not got its name
    atomic._flush = die
elif step == "between":  # two renames, where folders cannot be exchanged
    renames = [os.rename, os.rename, die]
    atomic.os.rename = lambda *args: renames.pop(0)(*args)
    def refuse(*args):
        raise OSError
    atomic._exchange = refuse
elif step == "after":  # it has its name, the old one is not removed yet
    atomic.shutil.rmtree = die
with getattr(atomic, kind)(path) as temporary:
    if kind == "file":
        temporary.write_text("new")
    else:
        (temporary / "new").touch()
    if step == "inside":
        die()
"""


def kill(step: str, kind: str, path: pathlib.Path) -> None:
    code = [sys.executable, "-c", KILLED, step, kind, str(path)]
    assert subprocess.run(code).returncode == -signal.SIGKILL


@pytest.mark.parametrize("step", ["inside", "before", "after", "between"])
def test_a_writer_killed_at_any_moment(tmp_path, step):
    path = tmp_path / "stage"
    with atomic.folder(path) as temporary:
        (temporary / "old").touch()
    kill(step, "folder", path)
    left = [p for p in tmp_path.iterdir() if p != path]
    assert all(p.name.startswith(".stage.") and p.suffix in (".tmp", ".old") for p in left)
    if step == "between":
        # Nothing is lost: both are there.
        assert sorted(names(p) for p in left) == [["new"], ["old"]] and not path.exists()
    else:
        assert names(path) == ["new" if step == "after" else "old"] and len(left) == 1
    with atomic.folder(path) as temporary:
        (temporary / "next").touch()
    assert names(path) == ["next"]


@pytest.mark.parametrize("step", ["inside", "before"])
def test_a_writer_of_a_file_killed(tmp_path, step):
    path = tmp_path / "card.json"
    path.write_text("old")
    kill(step, "file", path)
    assert path.read_text() == "old"
    (left,) = (p.name for p in tmp_path.iterdir() if p != path)
    assert left.startswith(".card.json.") and left.endswith(".tmp")


def test_leftovers_of_a_killed_writer_are_removed_once_they_are_old(tmp_path):
    path = tmp_path / "stage"
    kill("inside", "folder", path)
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".stage2.host.1.0.tmp"  # of another folder
    other.mkdir()
    with atomic.folder(path):
        assert left.exists()  # Its writer may be alive, on another host.
    old = left.stat().st_mtime - 2 * atomic.STALE_AFTER
    os.utime(other, (old, old))
    os.utime(left, (old, old))
    with atomic.folder(path):
        assert left.exists()  # A file in it is new.
    os.utime(left / "new", (old, old))
    os.utime(left, (old, old))
    with atomic.folder(path):
        assert not left.exists() and other.exists()


def test_a_folder_that_is_kept(tmp_path):
    path = tmp_path / "index"
    for name in ("first", "second"):
        with atomic.folder(path, replace=False) as temporary:
            (temporary / name).touch()
    assert names(tmp_path) == ["index", "index/first"]


def test_folders_that_are_links_and_names_that_are_long(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "stage").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "old").touch()
    with atomic.folder(tmp_path / "stage") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "stage").is_symlink() and names(tmp_path / "disk") == ["new"]
    long = tmp_path / ("ü" * 127)
    with atomic.folder(long) as temporary:
        (temporary / "new").touch()
    atomic.write_text(long / ("ü" * 127), "new")
    assert len(names(long)) == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_durable_results_are_flushed_before_they_are_renamed(tmp_path, monkeypatch, kind):
    flushed, path = [], tmp_path / "result"
    fsync = os.fsync

    def record(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append((pathlib.Path(name).name.partition(".result.")[0], path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", record)
    with getattr(atomic, kind)(path) as temporary:
        (temporary / "part" if kind == "folder" else temporary).write_text("content")
    parts = [("part", False)] if kind == "folder" else []
    assert flushed == [*parts, ("", False), (tmp_path.name, True)]
    flushed.clear()
    with atomic.file(tmp_path / "other", durable=False) as temporary:
        temporary.touch()
    assert flushed == []


def test_paths_of_epath(tmp_path):
    path = epath.Path(tmp_path) / "new" / "metrics.jsonl"
    atomic.write_text(path, "{}")
    assert path.read_text() == "{}" and names(tmp_path / "new") == ["metrics.jsonl"]
