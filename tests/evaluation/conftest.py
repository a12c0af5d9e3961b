"""Folders of samples."""

import json

import numpy as np
import pytest

from imagen_jax.io import images


@pytest.fixture
def write_samples(tmp_path):
    """(name, rows, level, per prompt) -> a folder as `sample` writes it, of constant images."""

    def write(name, rows, level=128, count=1, size=8) -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for p, row in enumerate(rows):
            for k in range(count):
                file = f"{p:05d}_{k:02d}.png"
                image = np.full((size, size, 3), level, np.uint8)
                images.save_png(folder / file, image, {"checkpoint": name})
                lines.append(
                    json.dumps({**row, "file": file, "prompt_index": p, "sample_index": k})
                )
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write


@pytest.fixture
def write_gallery(tmp_path):
    """(images, rows, name) -> a folder of PNG files with metadata.jsonl."""

    def write(pixels, rows=None, name="gallery") -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for i, image in enumerate(pixels):
            images.save_png(folder / f"{i:03d}.png", image, {})
            row = {"file_name": f"{i:03d}.png", "text": f"thing {i}", "key": f"k{i}"}
            lines.append(json.dumps({**row, **(rows[i] if rows else {})}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write


@pytest.fixture
def write_folder(tmp_path):
    """(images, rows, name) -> a folder as `sample` writes it."""

    def write(pixels, rows=None, name="samples") -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for i, image in enumerate(pixels):
            file = f"{i:05d}_00.png"
            images.save_png(folder / file, image, {})
            row = {"prompt": f"thing {i}", "key": f"k{i}", "file": file, "prompt_index": i}
            lines.append(json.dumps({**row, **(rows[i] if rows else {})}))
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write
