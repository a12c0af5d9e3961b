"""Edge sharpness of blurred images, and seams inserted into images."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_jax.cli import main
from imagen_jax.evaluation import edges
from imagen_jax.worlds.shapes import scenes
from tests.reference import scene_samples

SCENES = [scenes.scene("held_out", i) for i in range(24)]
LARGE = [scenes.render(scene, 256) for scene in SCENES]
SMALL = [scenes.render(scene) for scene in SCENES]


def _bicubic(image):
    return np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC))


def _seams(image_list, period):
    sums = [edges.seam_sums(a, b, period) for a, b in zip(image_list, SMALL, strict=True)]
    return edges.seams(sums)


def test_sharpness_is_the_jump_along_an_edge():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:, 0] = 120
    assert edges.sharpness(image) == pytest.approx(120)
    image[:, 6:10, 0] = (24, 48, 72, 96)  # The same edge over five jumps.
    assert edges.sharpness(image) == pytest.approx(24)
    assert edges.sharpness(np.zeros((16, 16, 3), np.uint8)) == 0


def test_blur_is_less_sharp_and_noise_is_no_edge():
    rng = np.random.default_rng(0)
    for image, lowres in zip(LARGE[:8], SMALL[:8], strict=True):
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
        assert edges.sharpness(_bicubic(lowres)) < edges.sharpness(blurred) < edges.sharpness(image)
        faint, coarse = (
            np.clip(np.rint(image + rng.normal(0, sd, image.shape)), 0, 255).astype(np.uint8)
            for sd in (1, 6)
        )
        assert edges.sharpness(faint) == pytest.approx(edges.sharpness(image), rel=0.03)
        assert edges.sharpness(coarse) < edges.sharpness(image)


def test_real_images_have_no_seams():
    for period in (4, 64):
        found = _seams(LARGE, period)
        assert found["flat"]["low"] > 0.999 and found["flat"]["high"] < 1.001
        assert found["all"]["low"] < 1.03 and found["all"]["high"] > 0.97


def test_tiles_of_different_brightness_are_seams():
    """A tiling of crops, each with a brightness offset of up to two levels."""
    rng = np.random.default_rng(0)
    offsets = rng.integers(-2, 3, (len(LARGE), 4, 4, 1)).repeat(64, axis=1).repeat(64, axis=2)
    tiled = np.clip(np.stack(LARGE) + offsets, 0, 255).astype(np.uint8)
    assert _seams(tiled, 64)["flat"]["low"] > 1.1
    assert _seams(tiled, 64)["all"]["mean"] > _seams(LARGE, 64)["all"]["mean"]


def test_a_lattice_is_a_seam_at_its_period_and_noise_is_none():
    rng = np.random.default_rng(0)
    noise = np.rint(np.stack(LARGE) + rng.normal(0, 1, (len(LARGE), 256, 256, 3)))
    lattice = np.zeros((256, 256, 1))
    lattice[::4] = lattice[:, ::4] = 1
    noisy, lined = (np.clip(p, 0, 255).astype(np.uint8) for p in (noise, noise + 2 * lattice))
    assert abs(_seams(noisy, 4)["flat"]["mean"] - 1) < 0.01
    assert _seams(lined, 4)["flat"]["low"] > 1.02
    # A smooth line in a noisy image is a seam, too.
    smooth = noisy.copy()
    smooth[:, 63:193:64] = smooth[:, 64:193:64]
    smooth[63:193:64] = smooth[64:193:64]
    assert _seams(smooth, 64)["flat"]["high"] < 0.9


@pytest.fixture
def folders(tmp_path):
    for name, image_list in (("large", LARGE), ("small", SMALL)):
        (tmp_path / name).mkdir()
        scene_samples.write(tmp_path / name, SCENES[:6], image_list[:6])
    return tmp_path


def _run(folders, *flags):
    given = [f"--samples={folders / 'large'}", f"--lowres={folders / 'small'}"]
    return main.main(["evaluate", "edges", *given, f"--out={folders / 'edges.json'}", *flags])


def test_the_command_measures_samples(folders, capsys):
    assert _run(folders) == 0
    card = json.loads((folders / "edges.json").read_text())
    assert card["pictures"] == 6 and card["sharper"] == 1 and list(card["seams"]) == ["4", "64"]
    # Unnamed sizes of the real images differ from those of the samples.
    assert card["sharpness"]["drawn"] == pytest.approx(card["sharpness"]["real"], rel=0.05)
    assert card["sharpness"]["real"] > 3 * card["sharpness"]["bicubic"]
    assert set(card["seams"]["4"]) == set(card["seams"]["64"]) == {"drawn", "real"}
    assert "sharper than bicubic: 1.000 of 6 images" in capsys.readouterr().out
    for i, lowres in enumerate(SMALL[:6]):
        Image.fromarray(_bicubic(lowres)).save(folders / "large" / f"{i:05}_00.png")
    assert _run(folders) == 0
    assert json.loads((folders / "edges.json").read_text())["sharper"] == 0


def test_folders_that_do_not_match_are_rejected(folders, capsys):
    assert _run(folders, "--crop=100") == 1
    assert "--crop=100 do not fit" in capsys.readouterr().err
    rows = (folders / "small" / "samples.jsonl").read_text().splitlines()
    (folders / "small" / "samples.jsonl").write_text("\n".join(rows[1:]) + "\n")
    assert _run(folders) == 1
    assert "has no 00000_00.png of the prompt" in capsys.readouterr().err
