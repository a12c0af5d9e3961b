"""One trained stage draws: from keys, text and a low-resolution picture to pictures.

Twice, by the same pieces. `sample_stage` is the whole of it as one program, for what is compiled,
counted or exported whole. `begin` and `advance` are the same denoising that can be looked at on
the way, compiled by `batches`: `advance` takes any number of steps with one compilation, so that
`cascade` can report progress and show the estimates of x0. Each picture's noise follows from its
own key.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing, process, samplers
from imagen_jax.diffusion.samplers import Denoising, Sampler
from imagen_jax.stages.stage import aug_noise_side, augment_lowres, denoiser

SAMPLE_STREAM = 2  # beside the streams of train_step.py
# Lists of steps are padded to a multiple of this, so that programs are shared by their lengths.
PADDED_STEPS = 256


class Conditioning(NamedTuple):
    """What a stage is told of the B pictures it draws.

    Attributes:
      text_emb: [B, L, D] embeddings of the prompts.
      text_mask: [B, L], True at real tokens.
      keys: [B] of the steps' noise.
      lowres: SR stages: [B, size, size, 3], upsampled and noised.
      aug_level: SR stages: [B], the level it was noised to.
      guidance_weight: [B]; None: as `config.sampling` says.
      negative: embeddings and mask of what to lead away from; None: of no text.
      known: [B, size, size, 3], pictures of which a part is kept; None: none.
      mask: [B, size, size, 1], True where they are not.
    """

    text_emb: Array
    text_mask: Array
    keys: Array
    lowres: Array | None = None
    aug_level: Array | None = None
    guidance_weight: Array | None = None
    negative: tuple[Array, Array] | None = None
    known: Array | None = None
    mask: Array | None = None


class Levels(NamedTuple):
    """Noise levels that the steps lead from and to, [N] nats each; padded beyond `count`."""

    logsnr_t: np.ndarray | Array
    logsnr_s: np.ndarray | Array
    count: int


def image_keys(
    seed: int | Sequence[int],
    prompt_indices: Sequence[int],
    sample_indices: Sequence[int],
) -> Key[Array, " b"]:
    """One key per picture, a function of (seed, prompt index, sample index) alone.

    Args:
      seed: of all pictures, or one for each, 0 to 2**32 - 1.
      prompt_indices: B of them.
      sample_indices: B of them.
    """
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), (len(prompt_indices),))
    return fold_image_keys(
        seeds, np.asarray(prompt_indices, np.uint32), np.asarray(sample_indices, np.uint32)
    )


@jax.jit
@jax.vmap
def fold_image_keys(seed: Array, prompt: Array, sample: Array) -> Array:
    """`image_keys` of uint32 arrays [B], within other programs."""
    stream = jax.random.fold_in(jax.random.key(seed), SAMPLE_STREAM)
    return jax.random.fold_in(jax.random.fold_in(stream, prompt), sample)


def stage_keys(keys: Key[Array, " b"], index: int) -> Key[Array, " b"]:
    """The keys of the stage at place `index` of a cascade."""
    return _fold(keys, index)


_fold = jax.jit(samplers.fold)


def make_sampler(config: Config) -> Sampler:
    """The sampler that `config.sampling` names, with its options."""
    settings = config.sampling
    options = {"gamma": settings.gamma} if settings.sampler == "ddpm" else {}
    return samplers.SAMPLERS[settings.sampler](**options)


@functools.lru_cache(maxsize=256)
def levels(config: Config, strength: float = 1.0, resamplings: int = 1, jump: int = 1) -> Levels:
    """The levels of all steps of a stage, from noise to picture; see `editing.walk`."""
    walk = editing.walk(config.sampling.steps, strength, resamplings, jump)
    count = len(walk[0])
    padding = np.zeros(-count % PADDED_STEPS, np.float32)
    logsnr_t, logsnr_s = (
        np.asarray(process.logsnr_at(jnp.asarray([*times, *padding]), config.diffusion))
        for times in walk
    )
    return Levels(logsnr_t, logsnr_s, count)


def tell(
    config: Config,
    text_emb: Float[Array, "b l d"],
    text_mask: Bool[Array, "b l"],
    keys: Key[Array, " b"],
    lowres: Float[Array, "b h w c"] | None,
    aug_level: Float[Array, " b"] | None,
) -> tuple[Conditioning, Float[Array, "b size size 3"]]:
    """What a stage is told, with the noise it starts from: all that is drawn from `keys`."""
    start_keys, lowres_keys, step_keys = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0
    )
    size = config.data.image_size
    start = samplers.normal(start_keys, (size, size, 3))
    if lowres is None or aug_level is None:
        return Conditioning(text_emb, text_mask, step_keys), start
    side = aug_noise_side(config)
    noise = samplers.normal(lowres_keys, (side, side, 3))
    lowres = augment_lowres(lowres, aug_level, noise, config)
    return Conditioning(text_emb, text_mask, step_keys, lowres, aug_level), start


def _sampler(config: Config, told: Conditioning) -> Sampler:
    sampler = make_sampler(config)
    if told.known is None or told.mask is None:
        return sampler
    return editing.repaint_sampler(sampler, told.known, told.mask)


def _denoiser(
    params: Any, config: Config, told: Conditioning, guide: tuple[Any, Config] | None = None
):
    return denoiser(
        params,
        config,
        text_emb=told.text_emb,
        text_mask=told.text_mask,
        lowres=told.lowres,
        aug_level=told.aug_level,
        guidance_weight=told.guidance_weight,
        negative=told.negative,
        guide=guide,
    )


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
    settings = config.sampling
    aug_level = None if lowres is None else jnp.full(keys.shape, settings.aug_level)
    told, start = tell(config, text_emb, text_mask, keys, lowres, aug_level)
    times = np.linspace(1.0, 0.0, settings.steps + 1, dtype=np.float32)
    x0 = samplers.sample_loop(
        make_sampler(config),
        _denoiser(params, config, told),
        start,
        process.logsnr_at(jnp.asarray(times), config.diffusion),
        told.keys,
    )
    return jnp.clip(x0, -1.0, 1.0)


def shared(config: Config) -> Config:
    """`config` without the values that `begin` and `advance` are given as arrays.

    It is what their programs are told apart by: those of other values are the same. Guidance that
    oscillates has to know the number of steps, and guidance that is off, of weight 1, is no value.
    """
    settings = config.sampling
    steps = settings.steps if settings.guidance_oscillate_after >= 0 else 1
    weight = 1.0 if settings.guidance_weight == 1.0 else 2.0
    sampling = dataclasses.replace(settings, steps=steps, aug_level=0.0, guidance_weight=weight)
    return dataclasses.replace(config, sampling=sampling)


def begin(
    config: Config,
    text_emb: Float[Array, "b l d"],
    text_mask: Bool[Array, "b l"],
    keys: Key[Array, " b"],
    lowres: Float[Array, "b h w c"] | None = None,
    aug_level: Float[Array, " b"] | None = None,
    guidance_weight: Float[Array, " b"] | None = None,
    negative: tuple[Float[Array, "b l d"], Bool[Array, "b l"]] | None = None,
    edited: tuple[Float[Array, "b size size 3"], Float[Array, " b"]] | None = None,
    mask: Bool[Array, "b size size 1"] | None = None,
) -> tuple[Conditioning, Denoising]:
    """Noise, and what the stage is told; arguments as those of `sample_stage`.

    Args:
      config: from `shared`.
      text_emb: text embeddings, padded.
      text_mask: True at real tokens.
      keys: one key per picture.
      lowres: SR stages: the pictures of the stage before, in [-1, 1].
      aug_level: SR stages: what to noise them to.
      guidance_weight: of each picture; None: that of `config`.
      negative: embeddings and mask of what to lead away from; None: of no text.
      edited: pictures to start from in [-1, 1], and the logsnr to noise them to; None: from noise.
      mask: True where these may be changed; None: everywhere.
    """
    told, start = tell(config, text_emb, text_mask, keys, lowres, aug_level)
    told = told._replace(guidance_weight=guidance_weight, negative=negative)
    if edited:
        start = process.q_sample(*edited, start)
        if mask is not None:
            told = told._replace(known=edited[0], mask=mask)
    return told, Denoising(start, _sampler(config, told).init(start), jnp.zeros_like(start))


def advance(
    params: Any,
    config: Config,
    told: Conditioning,
    at: Denoising,
    levels: tuple[Float[Array, " n"], Float[Array, " n"]],
    first: Int[Array, ""],
    last: Int[Array, ""],
    guide_params: Any = None,
    guide_config: Config | None = None,
) -> Denoising:
    """Denoises from step `first` up to, not including, step `last`.

    The bounds are values, not shapes: one compilation serves any of them, and any number of steps.
    After the last step of all, x0 is the picture.

    Args:
      params: plain parameters.
      config: from `shared`.
      told: from `begin`.
      at: from `begin`, or from the steps before.
      levels: logsnr_t and logsnr_s of every step, see `Levels`.
      first: a step.
      last: a step, at most `Levels.count`.
      guide_params: of the checkpoint that guides (autoguidance); None: none does.
      guide_config: its stage.
    """
    guide = None if guide_config is None else (guide_params, guide_config)
    return samplers.denoise_steps(
        _sampler(config, told),
        _denoiser(params, config, told, guide),
        at,
        *levels,
        told.keys,
        first,
        last,
    )
