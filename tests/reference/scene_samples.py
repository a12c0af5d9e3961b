"""Folders as `imagen sample` writes them, with scenes of the shapes world as prompt rows."""

import json

from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes as shapes


def write(folder, scenes, pixels, drop=()):
    """Writes images and samples.jsonl; `drop`: fields of the objects that the rows leave out."""
    with open(folder / "samples.jsonl", "w") as file:
        for i, (scene, image) in enumerate(zip(scenes, pixels, strict=True)):
            name = f"{i:05}_00.png"
            images.save_png(folder / name, image, {})
            row = {"file": name, "prompt_index": i, "sample_index": 0, "seed": 0}
            row |= shapes.prompt_row(scene)
            for thing in row["objects"]:
                for field in drop:
                    del thing[field]
            file.write(json.dumps(row) + "\n")
