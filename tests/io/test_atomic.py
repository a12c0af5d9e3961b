"""Results are there whole or not at all, and nothing else is lost for them."""

import json

import pytest

from imagen_jax.io import atomic


def test_a_file_is_whole_or_as_it_was(tmp_path):
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


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "stage"
    for name in ("old", "new"):
        with atomic.folder(path) as temporary:
            (temporary / name).touch()
        assert [p.name for p in path.iterdir()] == [name]
    with pytest.raises(ValueError, match="no room"), atomic.folder(path) as temporary:
        (temporary / "half").touch()
        raise ValueError("no room")
    assert [p.name for p in tmp_path.rglob("*")] == ["stage", "new"]


def test_only_an_earlier_one_of_its_kind_is_replaced(tmp_path):
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
