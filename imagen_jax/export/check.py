"""Draws with what was exported, beside the live sampler: the last step of every export.

Two pictures of random text embeddings (and of a random low-resolution picture) are drawn by both,
from the same keys. The difference is logged in levels of 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import Config
from imagen_jax.inference import stage_sampler
from imagen_jax.io import images
from imagen_jax.stages.folder import Stage

PICTURES = 2
SEED = 0
# Rounding otherwise may tip a pixel over; a mean beyond this is another picture.
MAX_MEAN_LEVELS = 1.0


class ExportError(ValueError):
    """What was written does not draw what it should; the message says by how much."""


def check(live: Stage, exported: Stage, form: str, log: Callable[[str], None]) -> None:
    """Compares two sets of parameters, in two steps of the sampler.

    Raises:
      ExportError: the pictures differ.
    """
    config = live.config
    sampling = dataclasses.replace(config.sampling, steps=min(config.sampling.steps, 2))
    inputs = random_inputs(config)
    live_pictures, exported_pictures = (
        draw(Stage(dataclasses.replace(stage.config, sampling=sampling), stage.params), inputs)
        for stage in (live, exported)
    )
    compare(live_pictures, exported_pictures, form, log)


def random_inputs(config: Config) -> dict[str, Any]:
    """text_emb, text_mask, seed, prompt_index, sample_index, stage_index and, for SR, lowres."""
    rng = np.random.default_rng(SEED)
    length, low = config.data.max_text_len, config.data.lowres_size
    text_mask = np.arange(length) < rng.integers(1, length + 1, (PICTURES, 1))
    text_emb = rng.normal(size=(PICTURES, length, config.model.text_dim)).astype(np.float32)
    inputs = {
        "text_emb": text_emb * text_mask[..., None],
        "text_mask": text_mask,
        "seed": SEED,
        "prompt_index": list(range(PICTURES)),
        "sample_index": [0] * PICTURES,
        "stage_index": int(bool(low)),
    }
    if low:
        inputs["lowres"] = rng.uniform(-1, 1, (PICTURES, low, low, 3)).astype(np.float32)
    return inputs


def draw(stage: Stage, inputs: dict[str, Any]) -> np.ndarray:
    """The live sampler's pictures in [-1, 1]."""
    keys = stage_sampler.image_keys(inputs["seed"], inputs["prompt_index"], inputs["sample_index"])
    keys = stage_sampler.stage_keys(keys, inputs["stage_index"])
    lowres = jnp.asarray(inputs["lowres"]) if "lowres" in inputs else None
    text = jnp.asarray(inputs["text_emb"]), jnp.asarray(inputs["text_mask"])
    return np.asarray(stage_sampler.sample_stage(stage.params, stage.config, *text, keys, lowres))


def compare(live: np.ndarray, exported: np.ndarray, form: str, log: Callable[[str], None]) -> None:
    """Logs how far pictures in [-1, 1] are from each other. Raises ExportError."""
    if not np.isfinite(exported).all():
        raise ExportError(f"the {form} draws pictures that are not finite; not written")
    levels = [images.to_uint8(np.asarray(pictures)).astype(int) for pictures in (live, exported)]
    difference = np.abs(levels[0] - levels[1])
    said = f"differs from the live sampler by at most {difference.max()} of 255 levels"
    if difference.mean() > MAX_MEAN_LEVELS:
        raise ExportError(f"the {form} {said}, {difference.mean():.3g} on average; not written")
    log(f"{form}: {said} ({len(live)} pictures drawn)")
