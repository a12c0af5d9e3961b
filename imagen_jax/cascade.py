"""A chain of trained stages: from text embeddings to pictures (Imagen, Sec. 2.4 and Fig. A.4).

The base stage draws from noise; each following stage upsamples the picture before it, noises it to
its fixed aug_level and draws the larger picture. Each picture's noise follows from its own key, so
it is the same whatever else is in the batch.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from imagen_jax import config_io, diffusion, images, partitioning, sampling
from imagen_jax.config import Config
from imagen_jax.interop import weights
from imagen_jax.stage import aug_noise_side, denoiser, noised_lowres

SAMPLE_STREAM = 2  # beside the streams of train.py


class StageError(ValueError):
    """A stage folder cannot be used; the message names the file and what to do."""


class Stage(NamedTuple):
    """One trained stage.

    Attributes:
      config: its configuration.
      params: its parameters (EMA), float32.
    """

    config: Config
    params: Any


def load_stage(path: str) -> Stage:
    """Reads a stage folder (`config.json`, `params.safetensors`) as `export` writes it.

    Raises:
      StageError: a file is missing or unreadable.
    """
    folder = pathlib.Path(path)
    for name in ("config.json", "params.safetensors"):
        if not (folder / name).is_file():
            raise StageError(
                f"--stages: {folder} has no {name}; a stage folder is written by "
                "`imagen export --workdir=WORKDIR --out=DIR`"
            )
    try:
        config = config_io.from_json((folder / "config.json").read_text())
    except ValueError as error:
        raise StageError(f"{folder / 'config.json'}: {error}") from error
    return Stage(config, weights.unflatten(weights.read_safetensors(folder / "params.safetensors")))


def check_chain(configs: Sequence[Config]) -> None:
    """Raises StageError when the stages do not follow from each other."""
    size = 0
    for config in configs:
        if config.data.lowres_size != size:
            before = f"a {size} px picture" if size else "nothing"
            wants = f"a {config.data.lowres_size} px picture" if config.data.lowres_size else "none"
            raise StageError(
                f"--stages: stage {config.name!r} is given {before} and wants {wants}; "
                "list the base stage first, then its super-resolution stages"
            )
        size = config.data.image_size


def picture_keys(
    seed: int, prompt_indices: Sequence[int], sample_indices: Sequence[int]
) -> Key[Array, " b"]:
    """One key per picture, a function of (seed, prompt index, sample index) alone."""
    stream = jax.random.fold_in(jax.random.key(seed), SAMPLE_STREAM)
    fold = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(stream, p), s))
    return fold(jnp.asarray(prompt_indices, jnp.uint32), jnp.asarray(sample_indices, jnp.uint32))


@functools.partial(jax.jit, static_argnames="config")
def sample_stage(
    params: Any,
    config: Config,
    text_emb: Float[Array, "b l d"],
    text_mask: Bool[Array, "b l"],
    keys: Key[Array, " b"],
    lowres: Float[Array, "b h w c"] | None = None,
) -> Float[Array, "b size size c"]:
    """Draws one stage's pictures.

    Args:
      params: plain parameters.
      config: the stage; `config.sampling` says how it draws.
      text_emb: text embeddings, padded.
      text_mask: True at real tokens.
      keys: one key per picture.
      lowres: SR stages: the pictures of the stage before, in [-1, 1].

    Returns:
      Pictures in [-1, 1].
    """
    settings, size = config.sampling, config.data.image_size
    start_keys, lowres_keys, step_keys = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0
    )
    conditioning = {}
    if lowres is not None:
        aug_level = jnp.full(keys.shape, settings.aug_level)
        side = aug_noise_side(config)
        noise = sampling.normal(lowres_keys, (side, side, 3))
        conditioning = {
            "lowres": noised_lowres(lowres, aug_level, noise, config),
            "aug_level": aug_level,
        }
    denoise = denoiser(params, config, text_emb=text_emb, text_mask=text_mask, **conditioning)
    options = {"gamma": settings.gamma} if settings.sampler == "ddpm" else {}
    times = jnp.linspace(1.0, 0.0, settings.steps + 1)
    x0 = sampling.sample_loop(
        sampling.SAMPLERS[settings.sampler](**options),
        denoise,
        sampling.normal(start_keys, (size, size, 3)),
        diffusion.logsnr_at(times, config.diffusion),
        step_keys,
    )
    return jnp.clip(x0, -1.0, 1.0)


def sample(
    stages: Sequence[Stage],
    text_emb: Float[np.ndarray, "b l d"],
    text_mask: Bool[np.ndarray, "b l"],
    keys: Key[Array, " b"],
) -> list[UInt8[np.ndarray, "b size size c"]]:
    """Draws the pictures of every stage of the cascade, coarsest first, on all devices at once.

    Args:
      stages: base stage first; see `check_chain`.
      text_emb: text embeddings, padded.
      text_mask: True at real tokens.
      keys: from `picture_keys`.
    """
    drawn, pictures = [], None
    text_emb, text_mask, keys = partitioning.spread((text_emb, text_mask, keys))
    for index, stage in enumerate(stages):
        stage_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        pictures = sample_stage(
            stage.params, stage.config, text_emb, text_mask, stage_keys, pictures
        )
        drawn.append(images.to_uint8(np.asarray(pictures)))
    return drawn
