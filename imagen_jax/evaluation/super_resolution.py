"""Upsamples the images of a stage with a super-resolution stage that receives no text.

Text alignment of the result is due to the base stage alone, and base stages with different text
encoders can share one super-resolution stage.
"""

from __future__ import annotations

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from imagen_jax.evaluation import samples
from imagen_jax.inference.cascade import Cascade
from imagen_jax.io import atomic, images
from imagen_jax.parallel import distributed
from imagen_jax.stages.conditioning import Text, null_text


def load(folder: str) -> Cascade:
    """Loads a stage folder without its text encoder."""
    return Cascade.load([folder], text_encoder=None)


def upsample_samples(
    stage: Cascade, samples_dir: str | os.PathLike[str], out: str, *, seed: int, batch_size: int
) -> None:
    """Writes `OUT/PPPPP_KK.png` and `OUT/samples.jsonl`: the same rows, upsampled images.

    Sampling uses the exported settings and the null text of caption dropout, without guidance.

    Args:
      stage: result of `load`.
      samples_dir: folder written by `sample`, with images of the stage's low-resolution size.
      out: folder to write; several processes share it.
      seed: seed of the noise, together with the row's prompt and sample index.
      batch_size: images per batch.

    Raises:
      EvaluationError: an image is missing. RequestError: images of another size.
    """
    rows, config = samples.read_rows(samples_dir), stage.configs[0]
    own = rows[distributed.index() :: distributed.count()]
    if own:
        shape = (len(own), config.data.max_text_len)
        width = config.model.text_dim
        null = null_text(Text(jnp.zeros((*shape, width)), jnp.zeros(shape, bool)))
        upsampled = stage.sample(
            text_emb=np.asarray(null.emb),
            text_mask=np.asarray(null.mask),
            lowres=np.stack([samples.load(samples_dir, row["file"]) for row in own]),
            seed=seed,
            prompt_indices=[row["prompt_index"] for row in own],
            sample_indices=[row["sample_index"] for row in own],
            stage_settings={config.name: {"guidance_weight": 1.0}},
            batch_size=batch_size,
        )
        for row, image in zip(own, upsampled, strict=True):
            images.save_png(pathlib.Path(out) / row["file"], image, {"prompt": row["prompt"]})
    distributed.all_gather(np.zeros(()))  # Barrier: all processes have written.
    if distributed.is_first():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic.write_text(pathlib.Path(out) / "samples.jsonl", "".join(lines))
