"""A path of the user: local, with ~, or refused in one line."""

import pathlib

import numpy as np
import pytest
from etils import epath

from imagen_jax.config.data import DataConfig
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import atomic, images, paths


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in (
        ("data/images", "data/images"),
        ("/data/images", "/data/images"),
        ("~/images", f"{tmp_path}/images"),
        ("~", f"{tmp_path}"),
        ("a:b/c", "a:b/c"),
        ("", "."),
    ):
        found = paths.local_or_remote(given, "config.data.path")
        assert isinstance(found, epath.Path) and str(found) == expected
        found = paths.local(given, "config.data.path")
        assert isinstance(found, pathlib.Path) and str(found) == expected
    found = paths.local_or_remote(pathlib.Path("~/images"), "--out")
    assert str(found) == f"{tmp_path}/images"


def test_the_home_of_an_unknown_user(tmp_path):
    assert str(paths.local_or_remote("~no_such_user/a", "--out")) == "~no_such_user/a"


@pytest.mark.parametrize("scheme", ["gs", "s3", "hdfs", "file", "https", "az+x"])
def test_other_schemes_are_refused_in_one_line(scheme):
    for make in (paths.local_or_remote, paths.local):
        with pytest.raises(paths.PathError) as error:
            make(f"{scheme}://bucket/a", "--out")
        assert str(error.value) == (
            f"--out={scheme}://bucket/a: {scheme}:// paths (object stores) are not supported here "
            "yet; give a local path"
        )


def test_where_a_path_enters(tmp_path, monkeypatch):
    """Data and outputs: ~ is the home folder, and an output in a bucket is refused by name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for size in (16, 32):
        images.save_png(tmp_path / "data" / f"{size}.png", np.zeros((size, size, 3), np.uint8), {})
        (tmp_path / "data" / f"{size}.txt").write_text("black")
    assert len(open_source(DataConfig(kind="folder", path="~/data"))) == 2
    assert atomic.check_replaceable("~/stage", "a", "stage") == tmp_path / "stage"
    with pytest.raises(paths.PathError, match=r"^--out=gs://b/a: gs:// paths"):
        atomic.check_replaceable("gs://b/a", "a", "stage")
