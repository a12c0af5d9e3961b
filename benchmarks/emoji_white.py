"""How white the white of generated emoji is, by thresholding (docs/emoji.md).

    python benchmarks/emoji_white.py --stages=runs/emoji/stages/base,runs/emoji/stages/sr \
        --data=runs/emoji/data

Generates the first training captions and reads the pixels that are white in the real images. The
mean level and the level that a tenth of them is below are of 255.

Hardware: one CPU core. Time: a minute for each thresholding.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from imagen_jax import Cascade
from imagen_jax.diffusion.thresholding import THRESHOLDS
from imagen_jax.evaluation.retrieval import gallery as gallery_lib
from imagen_jax.inference import prompts

WHITE = 254  # Least level of a white pixel of a real image.


def levels(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Mean and tenth percentile of `generated` [n, h, w, 3] where `real` is white."""
    white = (real >= WHITE).all(axis=-1)
    return float(generated[white].mean()), float(np.percentile(generated[white], 10))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="stage folders, separated by commas")
    flags.add_argument("--data", type=pathlib.Path, required=True, help="data of launch/emoji.sh")
    flags.add_argument("--count", type=int, default=64, help="prompts")
    args = flags.parse_args()
    rows = prompts.read(str(args.data / "prompts_train.jsonl"))[: args.count]
    cascade = Cascade.load(args.stages.split(","))
    size = cascade.configs[-1].data.image_size
    real = gallery_lib.read(str(args.data / "gallery"), size=size, at_most=None, fit="center_crop")
    right = [images[0] for images in gallery_lib.answers(rows, real, "key")]
    print("| thresholding of all stages | white pixels, mean | tenth percentile |\n|---|---|---|")
    for name in THRESHOLDS:
        settings = {config.name: {"thresholding": name} for config in cascade.configs}
        generated = cascade.sample([row["prompt"] for row in rows], stage_settings=settings)
        mean, tenth = levels(generated, real.pixels[right])
        print(f"| {name} | {mean:.1f} | {tenth:.0f} |", flush=True)


if __name__ == "__main__":
    main()
