"""launch/folder.sh on a user's folder: eight photographs, trained until memorised."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.io import images

REPOSITORY = pathlib.Path(__file__).parents[2]
CAPTIONS = {
    "astronaut.png": "an astronaut in an orange space suit smiles in front of a flag",
    "chelsea.png": "a close portrait of a tabby cat",
    "coffee.png": "a cup of espresso on a saucer with a spoon",
    "rocket.jpg": "a rocket on its launch pad at dusk",
    "motorcycle_left.png": "a motorcycle parked in a garage",
    "camera.png": "a photographer with a tripod on a field, black and white",
    "coins.png": "rows of ancient coins on a dark cloth",
    "hubble_deep_field.jpg": "countless distant galaxies in a black sky",
}


@pytest.mark.slow
def test_eight_photographs_are_memorised(tmp_path: pathlib.Path):
    skimage_data = pytest.importorskip("skimage.data")
    source = pathlib.Path(skimage_data.__file__).parent
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, caption in CAPTIONS.items():
        (photos / name).write_bytes((source / name).read_bytes())
        (photos / name).with_suffix(".txt").write_text(caption)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS.values()))
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(
        ["bash", "launch/folder.sh", photos, run], cwd=REPOSITORY, env=environment, check=True
    )
    stages = f"{run}/stages/base,{run}/stages/sr"
    command = [sys.executable, "-m", "imagen_jax", "sample", f"--stages={stages}"]
    command += [f"--prompts={prompts}", f"--out={run}/samples", "--seed=3"]
    subprocess.run(command, cwd=REPOSITORY, check=True)

    originals = [
        images.center_crop_resize(images.decode((photos / name).read_bytes()), 64, "box")
        for name in CAPTIONS
    ]
    rows = [json.loads(line) for line in (run / "samples" / "samples.jsonl").open()]
    assert [row["prompt"] for row in rows] == list(CAPTIONS.values())
    table = np.array(
        [
            [
                _psnr(np.asarray(Image.open(run / "samples" / row["file"])), other)
                for other in originals
            ]
            for row in rows
        ]
    )
    print(np.round(table, 1))
    assert (table.argmax(axis=1) == np.arange(8)).all(), table
    assert (table.diagonal() >= 22.0).all(), table.diagonal()


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))
