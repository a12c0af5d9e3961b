"""Compares what an export wrote with the live sampler; the last step of every export.

Both sample NUM_IMAGES images from the same keys, random text embeddings and, for a
super-resolution stage, random low-resolution images. The difference is logged in levels of 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import Config
from imagen_jax.inference import stage_sampler
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.stage import Stage

NUM_IMAGES = 2
SEED = 0
# Mean absolute difference (of 255) above which the export is rejected; rounding changes single
# pixels by one level.
MAX_MEAN_LEVELS = 1.0


class ExportError(ValueError):
    """The export samples other images than the live sampler; the message says by how much."""


def check(live: Stage, exported: Stage, form: str, log: Callable[[str], None]) -> None:
    """Compares the parameters of two stages, with at most two steps of the sampler.

    Args:
      live: the stage in memory; its configuration says how to sample.
      exported: the stage as read back.
      form: name of the format, for messages.
      log: receives a line.

    Raises:
      ExportError: the images differ.
    """
    config = live.config
    sampling = dataclasses.replace(config.sampling, steps=min(config.sampling.steps, 2))
    inputs = random_inputs(config)
    # Equal arrays are not placed beside each other: a stage may take most of the memory.
    exported = Stage(exported.config, jax.tree.map(_same_or_new, live.params, exported.params))
    live_images, exported_images = (
        sample(Stage(dataclasses.replace(stage.config, sampling=sampling), stage.params), inputs)
        for stage in (live, exported)
    )
    compare(live_images, exported_images, form, log)


def _same_or_new(live: Any, exported: Any) -> Any:
    """`live` where both arrays are equal, otherwise `exported`."""
    given = np.asarray(live)
    same = given.dtype == exported.dtype and np.array_equal(given, exported, equal_nan=True)
    return live if same else exported


def random_inputs(config: Config) -> dict[str, Any]:
    """Returns the arguments of `stablehlo_loader.Stage.__call__`, by name."""
    rng = np.random.default_rng(SEED)
    length, low = config.data.max_text_len, config.data.lowres_size
    text_mask = np.arange(length) < rng.integers(1, length + 1, (NUM_IMAGES, 1))
    text_emb = rng.normal(size=(NUM_IMAGES, length, config.model.text_dim)).astype(np.float32)
    inputs = {
        "text_emb": text_emb * text_mask[..., None],
        "text_mask": text_mask,
        "seed": SEED,
        "prompt_index": list(range(NUM_IMAGES)),
        "sample_index": [0] * NUM_IMAGES,
        "stage_index": int(bool(low)),
    }
    if low:
        inputs["lowres"] = rng.uniform(-1, 1, (NUM_IMAGES, low, low, 3)).astype(np.float32)
    return inputs


def sample(stage: Stage, inputs: dict[str, Any]) -> np.ndarray:
    """Returns the live sampler's images in [-1, 1]; `inputs` from `random_inputs`."""
    keys = stage_sampler.image_keys(inputs["seed"], inputs["prompt_index"], inputs["sample_index"])
    keys = stage_sampler.stage_keys(keys, inputs["stage_index"])
    lowres = jnp.asarray(inputs["lowres"]) if "lowres" in inputs else None
    text = Text(jnp.asarray(inputs["text_emb"]), jnp.asarray(inputs["text_mask"]))
    return np.asarray(stage_sampler.sample_stage(stage.params, stage.config, text, keys, lowres))


def compare(live: np.ndarray, exported: np.ndarray, form: str, log: Callable[[str], None]) -> None:
    """Logs the largest difference of two batches of images in [-1, 1].

    Raises:
      ExportError: `exported` is not finite, or the mean difference exceeds MAX_MEAN_LEVELS.
    """
    if not np.isfinite(exported).all():
        raise ExportError(f"the {form} samples images that are not finite; not written")
    levels = [images.to_uint8(np.asarray(batch)).astype(int) for batch in (live, exported)]
    difference = np.abs(levels[0] - levels[1])
    summary = f"differs from the live sampler by at most {difference.max()} of 255 levels"
    if difference.mean() > MAX_MEAN_LEVELS:
        raise ExportError(f"the {form} {summary}, {difference.mean():.3g} on average; not written")
    log(f"{form}: {summary} ({len(live)} images sampled)")
