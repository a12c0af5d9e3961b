"""Patch seams and edges of a super-resolution stage on real low-resolution images (shapes world).

    .venv/bin/python benchmarks/seams.py --stage=runs/demo/stages/sr2 \
        --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/demo/seams

In the samples of a cascade the positions of edges depend on the earlier stages: an outline that is
not quite sharp at 64 pixels is inside a pixel rather than between two. In real images edges have
any position. Renders the first --limit prompts at low resolution, upsamples them with the stage,
writes both as image folders to --out, and measures them like `imagen evaluate edges`:
OUT/edges.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.cli.wiring import add_cpu_devices, set_up_devices
from imagen_jax.evaluation import edges
from imagen_jax.inference import prompts
from imagen_jax.inference.cascade import Cascade
from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes
from imagen_jax.worlds.shapes.scorer import SCORER

SEED = 0


def real(rows: Sequence[Mapping[str, Any]], size: int) -> list[UInt8[np.ndarray, "size size 3"]]:
    """A rendered image of `size` pixels for each prompt row."""
    prompt_scenes = (
        scenes.scene_from_row(row, np.random.default_rng((SEED, index)))
        for index, row in enumerate(rows)
    )
    return [scenes.render(scene, size) for scene in prompt_scenes]


def write(
    folder: pathlib.Path, rows: Sequence[Mapping[str, Any]], image_batch: Iterable[np.ndarray]
) -> None:
    """Writes an image folder that `imagen evaluate` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [{"file": f"{index:05}_00.png", **row} for index, row in enumerate(rows)]
    for row, image in zip(named, image_batch, strict=True):
        images.save_png(folder / row["file"], image, {})
    lines = "".join(json.dumps(row) + "\n" for row in named)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", required=True, help="stage folder of a super-resolution stage")
    parser.add_argument("--prompts", required=True, help="prompts.jsonl of the shapes world")
    parser.add_argument("--limit", type=int, default=360, help="prompts")
    parser.add_argument("--crop", type=int, default=64, help="side of the training crops, pixels")
    parser.add_argument("--out", required=True, help="folder to write")
    add_cpu_devices(parser)
    flags = parser.parse_args()
    set_up_devices(flags.cpu_devices)
    stage, rows = Cascade.load([flags.stage]), prompts.read(flags.prompts)[: flags.limit]
    small = real(rows, stage.configs[0].data.lowres_size)
    large = stage.sample([row["prompt"] for row in rows], lowres=np.stack(small))
    out = pathlib.Path(flags.out)
    write(out / "small", rows, small)
    write(out / "large", rows, large)
    card = edges.evaluate(out / "large", out / "small", flags.crop, scorer=SCORER)
    (out / "edges.json").write_text(json.dumps(card, indent=1) + "\n")
    print(edges.format_table(card))


if __name__ == "__main__":
    main()
