"""Trains on generated data without files or captions: a function from a step to batches.

    python examples/custom_data.py --workdir=runs/discs

The images are discs of one of three colours on black, 8x8 pixels, rendered for every step. There is
no text encoder: each colour has an embedding, and a prompt is a row of that table. `train.train`
requires only `batches(step)`, an iterator of the batches from that step on. Here a batch is a
function of its step, so a killed run resumes exactly.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import (
    CheckpointConfig,
    Config,
    DiffusionConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from imagen_jax.export import export
from imagen_jax.inference.cascade import Cascade
from imagen_jax.io import images
from imagen_jax.stages.folder import load_stage
from imagen_jax.training.train import train

SIZE, WIDTH = 8, 8
COLORS = {"red": (225, 35, 35), "green": (35, 170, 60), "blue": (45, 75, 235)}
# The data set's own "text embeddings": one token of WIDTH channels per colour.
TABLE = np.eye(len(COLORS), WIDTH, dtype=np.float32)[:, None, :]


def configuration(steps: int) -> Config:
    """A base stage of 8x8 pixels conditioned on one token of WIDTH channels."""
    return Config(
        name="discs",
        data=DataConfig(image_size=SIZE, batch_size=16, max_text_len=1),
        model=ModelConfig(
            channels=(16,),
            num_res_blocks=(1,),
            self_attention=(True,),
            cross_attention=(True,),
            head_dim=16,
            num_groups=4,
            embed_dim=32,
            text_dim=WIDTH,
        ),
        diffusion=DiffusionConfig(prediction="x0", loss_weight="truncated_v"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        ema=EmaConfig(decay=0.98),
        train=TrainConfig(steps=steps, log_every=100),
        checkpoint=CheckpointConfig(every=max(steps // 2, 1)),
        sampling=SamplingConfig(sampler="ddim", steps=16, guidance_weight=1.0),
    )


def render_discs(colors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [B, SIZE, SIZE, 3]: a disc of each colour at a random position."""
    y, x = np.mgrid[:SIZE, :SIZE]
    centres = rng.uniform(3, SIZE - 4, (len(colors), 2, 1, 1))
    inside = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < 9
    return inside[..., None] * np.array(list(COLORS.values()), np.uint8)[colors][:, None, None]


def batches(step: int, batch_size: int = 16) -> Iterator[dict[str, np.ndarray]]:
    """The batches from step `step` on."""
    for index in itertools.count(step):
        rng = np.random.default_rng(index)
        colors = rng.integers(0, len(COLORS), batch_size)
        yield {
            "image": images.to_float(render_discs(colors, rng)),
            "text_emb": TABLE[colors],
            "text_mask": np.ones((batch_size, 1), bool),
        }


def main() -> None:
    """Trains, exports, generates four images of each colour and counts the correct ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=600)
    flags = parser.parse_args()

    train(configuration(flags.steps), f"{flags.workdir}/run", batches)
    export.export(f"{flags.workdir}/run", f"{flags.workdir}/stage")

    cascade = Cascade([load_stage(f"{flags.workdir}/stage")])
    requested = np.repeat(np.arange(len(COLORS)), 4)
    mask = np.ones((len(requested), 1), bool)
    samples = cascade.sample(text_emb=TABLE[requested], text_mask=mask, seed=1)
    path = f"{flags.workdir}/grid.png"
    images.save_png(path, images.grid(samples, columns=4, scale=8), {})

    # The brightest pixel of an image belongs to the disc; its nearest colour is the disc's.
    flat = samples.reshape(len(samples), -1, 3).astype(int)
    brightest = flat[np.arange(len(flat)), flat.sum(axis=2).argmax(axis=1)]
    palette = np.array(list(COLORS.values()))
    found = ((brightest[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1)
    print(f"{path}: {(found == requested).sum()} of {len(requested)} have the requested colour")


if __name__ == "__main__":
    main()
