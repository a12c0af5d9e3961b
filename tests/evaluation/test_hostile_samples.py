"""samples.jsonl of strangers: a path in it stays in its folder, for reading and for writing."""

import json
import os

import pytest
from PIL import Image

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import fid
from imagen_jax.evaluation.samples import EvaluationError

PATHS = ["../secret.png", "/etc/hostname", "a/../../secret.png", "..", "", ".", "a\0.png", "./../x"]


@pytest.mark.parametrize("file", PATHS)
def test_a_path_out_of_the_folder(tmp_path, file):
    (tmp_path / "samples").mkdir()
    row = {"file": file, "prompt": "a"}
    (tmp_path / "samples" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(EvaluationError, match="line 1: file=.* must be a path inside the folder"):
        samples.read_rows(tmp_path / "samples")


@pytest.mark.parametrize("target", ["../secret.png", "/etc/hostname", "../.."])
def test_a_link_out_of_the_folder(tmp_path, target):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").symlink_to(target)
    with pytest.raises(EvaluationError, match="leads out of the folder"):
        samples.load(tmp_path / "samples", "a.png")


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(EvaluationError, match="no regular file"):
        samples.load(tmp_path, "a.png")


def test_a_file_of_terabytes_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EvaluationError, match="too large"):
        samples.load(tmp_path, "a.png")


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b'{"file": "a.png", "prompt": "caf\xe9"}\n')
    with pytest.raises(EvaluationError, match="not UTF-8"):
        samples.read_rows(tmp_path)


def test_the_size_of_a_measurement_does_not_depend_on_names(tmp_path):
    """The same images under other names are measured at the same size."""
    sizes = [(40, 24), (32, 32), (28, 64)]
    for folder, names in (("one", "abc"), ("two", "cba"), ("three", "bca")):
        for name, size in zip(names, sizes, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", size).save(tmp_path / folder / f"{name}.png")
        assert fid.load_images(str(tmp_path / folder))[1] == 24
