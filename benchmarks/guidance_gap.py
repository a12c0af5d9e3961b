"""What guidance multiplies: the difference of the two estimates of x0 over noise levels.

    python benchmarks/guidance_gap.py --stages=runs/demo/stages/base --first_scene=1000
    python benchmarks/guidance_gap.py --stages=runs/emoji/stages/base \
        --prompts=runs/emoji/data/prompts_combinations_dev.jsonl --gallery=runs/emoji/data/gallery

Noises real images to each level, estimates them with and without their caption, x_c and x_u, and
prints, a row per stage and a column per level (logsnr, nats):

- the difference |x_c - x_u|, root of the mean square over pixels;
- the error |x_c - x| of the estimate with the caption. z / alpha estimates x, too, with the error
  sigma / alpha. The error of the best estimates, the posterior means, is smaller, and so is their
  difference, as E|x_c - x_u|^2 = E|x_u - x|^2 - E|x_c - x|^2. What is above sigma / alpha, printed
  in the last row, is error of the network;
- the divisor s of dynamic thresholding at guidance weight --weight: the 99.5th percentile of
  |x_u + w (x_c - x_u)|, at least 1, mean over images.

± is half of the 95% bootstrap interval over images. Without --prompts they are of the shapes
world's held-out scenes. Takes half a minute per stage on one CPU core.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sampler_grids
from jaxtyping import Array, Float

from imagen_jax.diffusion import guidance, process
from imagen_jax.evaluation.retrieval import gallery as gallery_lib
from imagen_jax.inference import prompts
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Conditioning, Text, null_text
from imagen_jax.stages.denoiser import predict_x0
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import embed_prompts, load_text_encoder
from imagen_jax.worlds.shapes import scenes

LEVELS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
BATCH, RESAMPLES = 50, 1000
TITLES = {
    "difference": "difference of the estimates",
    "error": "error with the caption",
    "divisor": "divisor of dynamic thresholding",
}
# Per image: squared difference, squared error with the caption, divisor.
Sums = Float[np.ndarray, "n 3"]


def real_images(args: argparse.Namespace, rows: Sequence[dict[str, Any]], size: int) -> np.ndarray:
    """The real image [size, size, 3] of each prompt, uint8."""
    if not args.gallery:
        numbers = range(args.first_scene, args.first_scene + len(rows))
        return np.stack([scenes.render(scenes.scene("held_out", n), size) for n in numbers])
    real = gallery_lib.read(args.gallery, size=0, at_most=None, fit="center_crop")
    right = gallery_lib.answers(rows, real, args.match)
    return np.stack([images.resize_host(real.pixels[min(found)], size) for found in right])


@functools.partial(jax.jit, static_argnames="config")
def compare(
    params: Any, config: Any, x: Array, logsnr: Array, text: Any, key: Any, weight: float
) -> Array:
    """`Sums` of a batch of images x [B, size, size, 3] in [-1, 1] at noise levels logsnr [B]."""
    text = Text(*text)
    z = process.q_sample(x, logsnr, jax.random.normal(key, x.shape))
    both = [text, null_text(text)]
    own, other = predict_x0(Stage(config, params), z, logsnr, Conditioning(text), both)
    guided = guidance.classifier_free(own, other, jnp.full(logsnr.shape, weight))
    percentile = config.sampling.threshold_percentile
    divisor = jnp.percentile(jnp.abs(guided).reshape(len(x), -1), percentile, axis=1)
    squares = [((a - b) ** 2).mean((1, 2, 3)) for a, b in ((own, other), (own, x))]
    return jnp.stack([*squares, jnp.maximum(divisor, 1.0)], axis=1)


def measure(folder: str, args: argparse.Namespace) -> list[Sums]:
    """`Sums` of all images at each of LEVELS."""
    stage = load_stage(folder)
    rows = (
        prompts.read(args.prompts)[: args.count] if args.prompts else sampler_grids.held_out(args)
    )
    x = images.to_float(real_images(args, rows, stage.config.data.image_size))
    text = embed_prompts(
        load_text_encoder(stage.config.text),
        [row["prompt"] for row in rows],
        batch_size=32,
        max_len=stage.config.data.max_text_len,
    )
    found = []
    for k, level in enumerate(LEVELS):
        parts = []
        for start in range(0, len(x), BATCH):
            part = slice(start, start + BATCH)
            batch, keys = x[part], jax.random.fold_in(jax.random.key(k), start)
            logsnr = np.full(len(batch), level, np.float32)
            own_text = tuple(array[part] for array in text)
            parts.append(
                compare(stage.params, stage.config, batch, logsnr, own_text, keys, args.weight)
            )
        found.append(np.concatenate(jax.device_get(parts)).astype(np.float64))
    return found


def difference(sums: Sums) -> float:
    """Root mean square of the difference."""
    return float(np.sqrt(sums[:, 0].mean()))


def error(sums: Sums) -> float:
    """Root mean square error of the estimate with the caption."""
    return float(np.sqrt(sums[:, 1].mean()))


def divisor(sums: Sums) -> float:
    """Mean divisor."""
    return float(sums[:, 2].mean())


STATISTICS: dict[str, Callable[[Sums], float]] = {
    "difference": difference,
    "error": error,
    "divisor": divisor,
}


def with_interval(statistic: Callable[[Sums], float], sums: Sums) -> dict[str, float]:
    """A statistic, and half of its 95% bootstrap interval over images."""
    rng = np.random.default_rng(0)
    draws = [statistic(sums[rng.integers(0, len(sums), len(sums))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": statistic(sums), "half": float(high - low) / 2}


def table(record: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown: a table per statistic, a row per stage."""
    lines = []
    for name, title in TITLES.items():
        lines += [f"| {title} | " + " | ".join(f"{level:g}" for level in LEVELS) + " |"]
        lines += ["|---" * (1 + len(LEVELS)) + "|"]
        for stage, found in record.items():
            cells = [f"{cell['value']:.2f} ± {cell['half']:.2f}" for cell in found[name]]
            if name != "divisor":
                cells = [f"{cell['value']:.3f}" for cell in found[name]]
            lines.append(f"| {stage} | " + " | ".join(cells) + " |")
        if name != "divisor":
            bounds = [f"{np.exp(-level / 2):.3f}" for level in LEVELS]
            lines.append(f"| sigma / alpha | {' | '.join(bounds)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="stage folders of one world, with commas")
    flags.add_argument("--names", default="", help="their names in the table")
    flags.add_argument("--prompts", default="", help="prompts of a development split")
    flags.add_argument("--first_scene", type=int, default=1000, help="without --prompts")
    flags.add_argument("--gallery", default="", help="with --prompts: folder of their real images")
    flags.add_argument("--match", default="key", help="field that names the right image")
    flags.add_argument("--weight", type=float, default=8.0, help="guidance weight of the divisor")
    flags.add_argument("--count", type=int, default=200, help="images")
    flags.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = flags.parse_args()
    folders = args.stages.split(",")
    names = args.names.split(",") if args.names else folders
    record = {}
    for name, folder in zip(names, folders, strict=True):
        sums = measure(folder, args)
        record[name] = {
            key: [with_interval(of, level) for level in sums] for key, of in STATISTICS.items()
        }
    print(table(record))
    if args.out:
        args.out.write_text(json.dumps({"levels": LEVELS, "stages": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
