"""The folder of images: bounded, kept over restarts, and nothing else in it is touched."""

import json

import numpy as np
from PIL import Image

from imagen_jax.serving.gallery import Gallery

IMAGE = np.full((4, 4, 3), 100, np.uint8)


def test_images_are_kept_with_their_settings(tmp_path):
    gallery = Gallery(tmp_path / "out", keep=10)
    settings = {"prompt": "ein <b>Hund</b> 🐕", "seed": 3, "stages": {"base": {"steps": 2}}}
    identifier = gallery.add(IMAGE, settings)
    (shown,) = gallery.newest(5)
    assert settings.items() <= shown.items() and shown["id"] == identifier
    file = gallery.file(identifier)
    assert file.parent == tmp_path / "out"
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), IMAGE)
        assert image.text["prompt"] == settings["prompt"] and image.text["seed"] == "3"
        assert json.loads(image.text["stages"]) == settings["stages"]
    for name in ("", "..", "../out/" + identifier, identifier.upper(), "0" * 32):
        assert gallery.file(name) is None


def test_the_newest_stay_over_restarts(tmp_path):
    (tmp_path / "letter.json").write_text("{}")
    (tmp_path / ("a" * 32 + ".json")).write_text("not JSON")
    (tmp_path / ("a" * 32 + ".png")).write_text("not an image")
    gallery = Gallery(tmp_path, keep=3)
    names = [gallery.add(IMAGE, {"prompt": str(n)}) for n in range(5)]
    assert [settings["prompt"] for settings in gallery.newest(9)] == ["4", "3", "2"]
    assert [settings["prompt"] for settings in gallery.newest(1)] == ["4"]
    assert gallery.file(names[1]) is None and not (tmp_path / f"{names[1]}.png").exists()
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 3

    again = Gallery(tmp_path, keep=2)
    assert [settings["prompt"] for settings in again.newest(9)] == ["4", "3"]
    assert again.file(names[4]).is_file() and len(list(tmp_path.iterdir())) == 3 + 2 * 2
    assert (tmp_path / "letter.json").read_text() == "{}"
