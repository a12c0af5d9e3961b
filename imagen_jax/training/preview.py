"""A grid of images to look at during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, UInt8

from imagen_jax.config.schema import Config
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import images
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.training.state import TrainState, evaluated_params


def preview(
    config: Config, state: TrainState, batch: Mapping[str, Array]
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid: a row of real images, one sampled with the EMA, one with the raw parameters."""
    return sampled_grid(config, [evaluated_params(state, name) for name in ("ema", None)], batch)


def sampled_grid(
    config: Config, params: Sequence[Any], batch: Mapping[str, Array]
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid: a row of real images of the batch, and one sampled with each of the parameters.

    The captions are the batch's; an SR stage gets the real low-resolution images. Images below 64
    pixels are shown enlarged, each pixel as a square.
    """
    count = min(8, len(batch["image"]))
    part = {name: partitioning.fetch(value[:count]) for name, value in batch.items()}
    keys = image_keys(config.seed, range(count), [0] * count)
    text = Text(part["text_emb"], part["text_mask"])
    rows = [images.to_uint8(part["image"])]
    for each in params:
        samples = sample_stage(each, config, text, keys, part.get("lowres"))
        rows.append(images.to_uint8(partitioning.fetch(samples)))
    pixels = np.concatenate(rows)
    enlargement = max(1, 64 // pixels.shape[1])
    return images.grid(pixels.repeat(enlargement, 1).repeat(enlargement, 2), columns=count)
