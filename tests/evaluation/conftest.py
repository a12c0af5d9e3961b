"""Folders of samples."""

import json

import numpy as np
import pytest

from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes as shapes


@pytest.fixture
def write_samples(tmp_path):
    """(name, rows, level, per prompt) -> a folder as `sample` writes it, of plain pictures."""

    def write(name, rows, level=128, count=1, size=8) -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for p, row in enumerate(rows):
            for k in range(count):
                file = f"{p:05d}_{k:02d}.png"
                picture = np.full((size, size, 3), level, np.uint8)
                images.save_png(folder / file, picture, {"checkpoint": name})
                lines.append(
                    json.dumps({**row, "file": file, "prompt_index": p, "sample_index": k})
                )
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write


@pytest.fixture
def write_drawn():
    """(folder, scenes, pictures, fields of objects to leave out) -> writes what `sample` would."""

    def write(folder, scenes, pictures, drop=()):
        with open(folder / "samples.jsonl", "w") as file:
            for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
                name = f"{i:05}_00.png"
                images.save_png(folder / name, picture, {})
                row = {"file": name, "prompt_index": i, "sample_index": 0, "seed": 0}
                row |= shapes.prompt_row(scene)
                for thing in row["objects"]:
                    for field in drop:
                        del thing[field]
                file.write(json.dumps(row) + "\n")

    return write
