"""Local copies of what is in buckets: in every flag, recorded by address, removed at the end."""

import argparse
import os
import pathlib
import signal
import tempfile

import pytest

from imagen_jax.cli import main, path_flags, staging
from imagen_jax.io import buckets
from imagen_jax.io.buckets import BucketError


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A bucket that holds everything and takes everything; temporary folders are in tmp_path."""
    uploaded = []

    def download(address: str, folder: pathlib.Path) -> pathlib.Path:
        copy = folder / address.rpartition("/")[2]
        copy.write_text(address)
        return copy

    def upload(path: pathlib.Path, address: str, *, last=()) -> int:
        uploaded.append((path.read_text(), address))
        return 1

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(buckets, "download", download)
    monkeypatch.setattr(buckets, "upload", upload)
    monkeypatch.setattr(buckets, "check_free", lambda address: None)
    return uploaded


def out(**flags) -> argparse.Namespace:
    return argparse.Namespace(out=path_flags.Output("gs://b/out.json"), **flags)


def test_a_flag_that_is_repeated(store, tmp_path):
    command = ["evaluate", "sweep", "--stages=gs://b/x,gs://b/y", "--stages=gs://b/z", "--grid={}"]
    _, flags = main.parse([*command, "--prompts=p.txt", f"--out={tmp_path}/out"])
    with staging.staged(flags):
        read = [[pathlib.Path(path).read_text() for path in paths] for paths in flags.stages]
        assert read == [["gs://b/x", "gs://b/y"], ["gs://b/z"]]
        assert path_flags.recorded(flags.stages[0]) == "gs://b/x,gs://b/y"
    assert path_flags.recorded(["a", "b"]) == "a,b"
    assert os.listdir(tmp_path) == []


def test_results_that_cannot_be_uploaded_are_kept(store, tmp_path, monkeypatch):
    def upload(path, address, *, last=()):
        raise BucketError(f"{address} cannot be used (HTTP 503)")

    monkeypatch.setattr(buckets, "upload", upload)
    flags = out(prompts=path_flags.Input("gs://b/p.txt"))
    kept = pytest.raises(BucketError, match="HTTP 503.; the results are kept in ")
    with kept as error, staging.staged(flags):
        pathlib.Path(flags.out).write_text("result")
    assert pathlib.Path(str(error.value).rpartition(" ")[2]).read_text() == "result"


def test_a_result_under_another_name_is_no_success(store, tmp_path):
    flags = out()
    nothing = pytest.raises(BucketError, match="out.json: nothing was written under this name")
    with nothing, staging.staged(flags):
        pathlib.Path(flags.out + ".npz").write_text("result")


def test_a_verb_that_fails_uploads_and_leaves_nothing(store, tmp_path):
    flags = out()
    with pytest.raises(ValueError, match="too few"), staging.staged(flags):
        pathlib.Path(flags.out).write_text("half")
        raise ValueError("too few")
    assert store == [] and os.listdir(tmp_path) == []


def test_sigterm_leaves_nothing(store, tmp_path):
    flags, before = out(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, staging.staged(flags):
        pathlib.Path(flags.out).write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert store == [] and os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("address", ["gs://bucket", "s3://bucket/"])
def test_results_need_a_name_in_the_bucket(address, monkeypatch, tmp_path, capsys):
    """An object has a name; this is refused before anything is computed."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    assert main.main(["sample", "--stages=s", "--prompt=a", f"--out={address}"]) == 1
    assert f"{address} is a bucket; add a name, as gs://BUCKET/NAME" in capsys.readouterr().err
