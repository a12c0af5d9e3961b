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
