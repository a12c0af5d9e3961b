"""Pictures of a stage, enlarged by a super-resolution stage that is told nothing of the prompt.

What the larger pictures show of a prompt, the stage before drew; and since nothing is read, stages
of different text encoders are compared by one super-resolution stage, whose encoder need not be
theirs.
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
from imagen_jax.stages.stage import drop_text


def load(folder: str) -> Cascade:
    """The stage of a folder, without its text encoder."""
    return Cascade.load([folder], text_encoder=None)


def enlarge(
    stage: Cascade, samples_dir: str | os.PathLike[str], out: str, *, seed: int, batch_size: int
) -> None:
    """Writes `OUT/PPPPP_KK.png` and `OUT/samples.jsonl`: the same rows, larger pictures.

    The stage draws as it was exported, with the null text that it learned to draw by when captions
    were dropped, and so without guidance.

    Args:
      stage: of `load`.
      samples_dir: folder that `sample` wrote, with pictures of the stage's low-resolution side.
      out: folder to write; several processes share it.
      seed: of the noise, which hangs on the row's prompt and sample index beside it.
      batch_size: pictures at a time.

    Raises:
      EvaluationError: a picture is missing. RequestError: pictures of another side.
    """
    rows, config = samples.read_rows(samples_dir), stage.configs[0]
    own = rows[distributed.index() :: distributed.count()]
    if own:
        shape = (len(own), config.data.max_text_len)
        text_emb, text_mask = drop_text(
            jnp.zeros((*shape, config.model.text_dim)),
            jnp.zeros(shape, bool),
            jnp.ones(len(own), bool),
        )
        pictures = stage.sample(
            text_emb=np.asarray(text_emb),
            text_mask=np.asarray(text_mask),
            lowres=np.stack([samples.load(samples_dir, row["file"]) for row in own]),
            seed=seed,
            prompt_indices=[row["prompt_index"] for row in own],
            sample_indices=[row["sample_index"] for row in own],
            stage_settings={config.name: {"guidance_weight": 1.0}},
            batch_size=batch_size,
        )
        for row, picture in zip(own, pictures, strict=True):
            images.save_png(pathlib.Path(out) / row["file"], picture, {"prompt": row["prompt"]})
    distributed.gather(np.zeros(()))  # Waits for the pictures of all processes.
    if distributed.is_first():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic.write_text(pathlib.Path(out) / "samples.jsonl", "".join(lines))
