"""index/duplicates.py: records that repeat another are counted, left out, and found elsewhere."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.config.data import DataConfig
from imagen_jax.data.index import duplicates, repeats
from imagen_jax.data.sources import registry


def photo(seed: int, side: int = 96) -> Image.Image:
    """An image with structure at all scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3))
    for cells in (3, 6, 12):
        layer = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        planes = [Image.fromarray(layer[..., c], "F").resize((side, side)) for c in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], axis=-1) * 60
    return Image.fromarray((pixels + 127).clip(0, 255).astype(np.uint8))


def save(path: pathlib.Path, image: Image.Image, caption: str, **options) -> None:
    image.save(path, **options)
    path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Ten images; 3 is 0 again, 4 is 1 smaller, 5 is 2 recompressed; 6 has the caption of 0."""
    path = tmp_path / "data"
    path.mkdir()
    for i in (0, 1, 2, 6, 7):
        save(path / f"{i}.png", photo(i), "one" if i in (0, 6) else f"caption {i}")
    save(path / "3.png", photo(0), "caption 3")
    save(path / "4.png", photo(1).resize((64, 64), Image.Resampling.LANCZOS), "caption 4")
    save(path / "5.jpg", photo(2), "caption 5", quality=60)
    save(path / "8.png", Image.new("RGB", (32, 32), "white"), "caption 8")
    save(path / "9.png", Image.new("RGB", (32, 32), "black"), "caption 9")
    return path


def open_folder(path: pathlib.Path, **options):
    data = DataConfig(kind="folder", path=str(path), **options)
    return registry.open_source(data, log=lambda line: None)


def numbers(source) -> str:
    return "".join(source.table.key(i)[0] for i in range(len(source)))


def test_duplicates_are_counted_and_left_out(folder):
    source = open_folder(folder)
    found = [source.duplicates(kind) for kind in duplicates.KINDS]
    assert [(one.groups, one.surplus) for one in found] == [(1, 1), (1, 1), (3, 3)]
    assert numbers(open_folder(folder, unique="captions")) == "012345789"
    assert numbers(open_folder(folder, unique="bytes")) == "012456789"
    pixels = open_folder(folder, unique="pixels")
    assert numbers(pixels) == "0126789"
    assert pixels.fingerprint != source.fingerprint and pixels.captions(3) == ("one",)
    assert numbers(open_folder(folder, unique="pixels", where="width<90")) == "489"


def test_keys_of_images_are_computed_once(folder, monkeypatch):
    first = open_folder(folder, unique="pixels")
    monkeypatch.setattr(duplicates, "_of_image", None)
    again = open_folder(folder, unique="pixels")
    assert again.fingerprint == first.fingerprint and numbers(again) == numbers(first)


def test_other_images_have_other_keys():
    found = []
    for seed in range(100):
        buffer = io.BytesIO()
        photo(seed).save(buffer, "png")
        found.append(duplicates.image_key(buffer.getvalue(), "pixels"))
    first = duplicates.first_of_each(np.array(found, "S32"), "pixels")
    assert first.tolist() == list(range(100))


@pytest.mark.parametrize("flipped", [0, 1, repeats.MAX_DISTANCE, 100])
def test_keys_with_few_different_signs_are_duplicates(flipped):
    rng = np.random.default_rng(flipped)
    keys = rng.integers(0, 256, (50, 32), np.uint8)
    bits = np.unpackbits(keys[:20], axis=1)
    for row in bits:
        # In four of the eight bands.
        row[rng.choice(128, flipped, replace=False)] ^= 1
    found = np.concatenate([keys, np.packbits(bits, axis=1)]).view("S32")[:, 0]
    first = duplicates.first_of_each(found, "pixels")
    same = flipped <= repeats.MAX_DISTANCE
    assert first.tolist() == [*range(50), *(range(20) if same else range(50, 70))]
    exact = duplicates.first_of_each(found, "bytes")
    assert (exact == first).all() == (flipped in (0, 100))


def test_the_command_reports_duplicates_and_overlap(folder, tmp_path, capsys):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    photo(7).resize((48, 48)).save(evaluation / "x.png")
    photo(1).save(evaluation / "y.png")
    config = tmp_path / "config.py"
    config.write_text(
        "from imagen_jax.config import overrides\n"
        "from imagen_jax.config.schema import Config\n"
        "def get_config(name=''):\n"
        "    c = overrides.to_config_dict(Config())\n"
        f"    c.data.kind, c.data.path = 'folder', {str(folder)!r}\n"
        "    return c\n"
    )
    command = ["prepare", f"--config={config}", "--duplicates", f"--overlap={evaluation}"]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert "duplicates by pixels: 3 of 10 records, in 3 groups" in said
    assert f"overlap with {evaluation} by bytes: 1 of 10 records (1.png)" in said
    assert "by pixels: 3 of 10 records (1.png, 4.png, 7.png)" in said
    assert main.main(["prepare", f"--config={config}", f"--overlap={tmp_path / 'no'}"]) == 1
    assert "holds no images" in capsys.readouterr().err
