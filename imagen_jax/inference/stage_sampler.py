"""One trained stage samples images: from keys, text and a low-resolution image to images.

`sample_stage` is the whole sampler as one program, for what is compiled, counted or exported whole.
`init_denoising` and `run_steps` are the same computation in parts, compiled by `batches`: one
compilation of `run_steps` runs any number of steps, so that `Cascade` can report progress and show
estimates of x0 between them. The noise of every image comes from the image's own key.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing, process, samplers, timesteps
from imagen_jax.diffusion.samplers import DenoisingState, Sampler, make_sampler
from imagen_jax.parallel import partitioning
from imagen_jax.stages.classifier import ClassifierConfig, TrainedClassifier
from imagen_jax.stages.conditioning import Conditioning, Text, add_lowres, aug_noise_side
from imagen_jax.stages.denoiser import ClassGuidance, make_denoiser
from imagen_jax.stages.stage import Stage

SAMPLE_STREAM = 2  # beside the streams of training/step.py
# Lists of steps are padded to a multiple of this, so that programs are shared by their lengths.
PADDED_STEPS = 256


class Noise(NamedTuple):
    """Noise of N images that is given instead of sampled, for parity and debugging.

    Attributes:
      start: [N, size, size, 3], what denoising starts from; None: sampled.
      steps: [N, T, size, size, 3] of the T steps, or of all but the last one, which then adds none;
        None: sampled. With heun, whose last step adds it too, of all.
      lowres: SR stages: [N, side, side, 3], added to the low-resolution image, see
        `conditioning.aug_noise_side`; None: sampled.
    """

    start: Any = None
    steps: Any = None
    lowres: Any = None


class SamplerInputs(NamedTuple):
    """Arrays that a stage samples B images from; NumPy on the host, JAX in the program.

    Attributes:
      text: embeddings and mask of the prompts.
      keys: [B], from `stage_keys`.
      lowres: SR stages: [B, h, w, 3], the images of the stage before, in [-1, 1].
      aug_level: SR stages: [B], the level to noise `lowres` to.
      guidance_weight: [B]; None: as `config.sampling` says.
      negative: embeddings and mask of the negative prompts; None: the null text.
      labels: [B, K], classes for the classifier, see `denoiser.ClassGuidance`; None: no classifier.
      classifier_scale: [B], with labels.
      init_images: [B, size, size, 3] in [-1, 1], images to start from; None: from noise.
      init_logsnr: [B], the logsnr that they are noised to, nats.
      mask: [B, size, size, 1], True where `init_images` may change; None: everywhere.
      noise: given noise, in place of that of the keys.
    """

    text: Text
    keys: Any
    lowres: Any = None
    aug_level: Any = None
    guidance_weight: Any = None
    negative: Text | None = None
    labels: Any = None
    classifier_scale: Any = None
    init_images: Any = None
    init_logsnr: Any = None
    mask: Any = None
    noise: Noise = Noise()


class StepInputs(NamedTuple):
    """What every denoising step of B images reads and no step changes.

    Attributes:
      conditioning: inputs of the network.
      keys: [B] of the steps' noise, or this noise itself, [T, B, size, size, 3].
      guidance_weight, negative, labels, classifier_scale, init_images, mask: as in
        `SamplerInputs`.
    """

    conditioning: Conditioning
    keys: Array
    guidance_weight: Array | None = None
    negative: Text | None = None
    labels: Array | None = None
    classifier_scale: Array | None = None
    init_images: Array | None = None
    mask: Array | None = None


class NoiseLevels(NamedTuple):
    """Noise levels that the steps start from and end at, [N] nats each; padded beyond `count`."""

    logsnr_t: np.ndarray | Array
    logsnr_s: np.ndarray | Array
    count: int


def image_keys(
    seed: int | Sequence[int],
    prompt_indices: Sequence[int],
    sample_indices: Sequence[int],
) -> Key[Array, " b"]:
    """One key per image, a function of (seed, prompt index, sample index) alone.

    Args:
      seed: of all images, or one for each, 0 to 2**32 - 1.
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
    """The keys of the stage at position `index` of a cascade."""
    return _fold_in_keys(keys, index)


_fold_in_keys = jax.jit(samplers.fold_in_keys)


@functools.lru_cache(maxsize=256)
def noise_levels(
    config: Config, strength: float = 1.0, resamplings: int = 1, jump: int = 1
) -> NoiseLevels:
    """The noise levels of all steps of a stage; arguments as those of `editing.timesteps`."""
    listed = timesteps.step_times(config.sampling, config.diffusion)
    times = editing.timesteps(config.sampling.steps, strength, resamplings, jump, listed)
    count = len(times[0])
    padding = np.zeros(-count % PADDED_STEPS, np.float32)
    logsnr_t, logsnr_s = (
        np.asarray(timesteps.logsnr_of(jnp.asarray([*t, *padding]), config.diffusion))
        for t in times
    )
    return NoiseLevels(logsnr_t, logsnr_s, count)


def sample_randomness(
    config: Config, inputs: SamplerInputs
) -> tuple[Conditioning, Array, Float[Array, "b size size 3"]]:
    """Everything that a stage samples before its first step, from the images' keys.

    Returns:
      The network's conditioning, whose low-resolution image has its augmentation noise; the keys of
      the steps, or their given noise; and the noise that denoising starts from.
    """
    start_keys, lowres_keys, step_keys = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(key, 3))(inputs.keys), 1, 0
    )
    size, given = config.data.image_size, inputs.noise
    start = samplers.normal(start_keys, (size, size, 3)) if given.start is None else given.start
    if given.steps is not None:
        step_keys = jnp.moveaxis(given.steps, 1, 0)
    if inputs.lowres is None or inputs.aug_level is None:
        return Conditioning(inputs.text), step_keys, start
    side = aug_noise_side(config)
    eps = samplers.normal(lowres_keys, (side, side, 3)) if given.lowres is None else given.lowres
    conditioning = add_lowres(inputs.text, inputs.lowres, inputs.aug_level, eps, config)
    return conditioning, step_keys, start


@functools.partial(jax.jit, static_argnames="config")
def sample_stage(
    params: Any,
    config: Config,
    text: Text,
    keys: Key[Array, " b"],
    lowres: Float[Array, "b h w c"] | None = None,
) -> Float[Array, "b size size c"]:
    """Samples one stage's images.

    Args:
      params: plain parameters.
      config: the stage; `config.sampling` gives sampler, guidance and thresholding.
      text: embeddings and mask of the prompts.
      keys: one key per image.
      lowres: SR stages: the images of the stage before, in [-1, 1].

    Returns:
      Images in [-1, 1].
    """
    aug_level = None if lowres is None else jnp.full(keys.shape, config.sampling.aug_level)
    inputs = SamplerInputs(text, keys, lowres, aug_level)
    conditioning, step_keys, start = sample_randomness(config, inputs)
    x0 = samplers.sample_loop(
        make_sampler(config.sampling),
        make_denoiser(Stage(config, params), conditioning),
        start,
        timesteps.step_levels(config.sampling, config.diffusion),
        step_keys,
    )
    return jnp.clip(x0, -1.0, 1.0)


@functools.lru_cache(maxsize=256)
def jit_cache_config(config: Config) -> Config:
    """The config with every traced field replaced by a placeholder: the key of compiled programs.

    Guidance weight and aug_level are arrays of `SamplerInputs`, LoRAs are added to the parameters
    before, and the steps are arrays and a traced bound, so configurations that differ in these
    alone share programs. Two exceptions: oscillating guidance depends on the steps, and a weight of
    1 compiles without guidance.
    """
    settings = config.sampling
    weight = 1.0 if settings.guidance_weight == 1.0 else 2.0
    sampling = dataclasses.replace(
        settings,
        aug_level=0.0,
        guidance_weight=weight,
        lora_scale=1.0,
        loras=(),
        batch_size=None,
    )
    if settings.guidance_oscillate_after < 0:
        spacing = timesteps.CONTINUOUS
        sampling = dataclasses.replace(sampling, steps=1, spacing=spacing, timesteps=())
    return dataclasses.replace(config, sampling=sampling)


def _edit_sampler(config: Config, step_inputs: StepInputs) -> Sampler:
    sampler = make_sampler(config.sampling)
    if step_inputs.init_images is None or step_inputs.mask is None:
        return sampler
    return editing.repaint_sampler(sampler, step_inputs.init_images, step_inputs.mask)


def init_denoising(config: Config, inputs: SamplerInputs) -> tuple[StepInputs, DenoisingState]:
    """Samples the noise of B images and gives what `run_steps` takes.

    Args:
      config: from `jit_cache_config`.
      inputs: text, keys and, where they apply, low-resolution, initial images and settings.
    """
    conditioning, step_keys, start = sample_randomness(config, inputs)
    step_inputs = StepInputs(
        conditioning,
        step_keys,
        inputs.guidance_weight,
        inputs.negative,
        inputs.labels,
        inputs.classifier_scale,
    )
    if inputs.init_images is not None:
        start = process.q_sample(inputs.init_images, inputs.init_logsnr, start)
        if inputs.mask is not None:
            step_inputs = step_inputs._replace(init_images=inputs.init_images, mask=inputs.mask)
    state = samplers.init_state(_edit_sampler(config, step_inputs), start)
    # Zeros depend on no input: without this every device would hold those of all images.
    rows = lambda x: partitioning.constrain(x, ("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return step_inputs, jax.tree.map(rows, state)


def run_steps(
    params: Any,
    config: Config,
    step_inputs: StepInputs,
    state: DenoisingState,
    levels: tuple[Float[Array, " n"], Float[Array, " n"]],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    guide_params: Any = None,
    guide_config: Config | None = None,
    classifier_params: Any = None,
    classifier_config: ClassifierConfig | None = None,
) -> DenoisingState:
    """Denoises from step `first` up to, not including, step `last`.

    The bounds are traced: one compilation runs any number of steps. After the last step of all, x0
    is the image.

    Args:
      params: plain parameters.
      config: from `jit_cache_config`.
      step_inputs: from `init_denoising`.
      state: from `init_denoising`, or from the steps before.
      levels: logsnr_t and logsnr_s of every step, see `NoiseLevels`.
      first: a step.
      last: a step, at most `NoiseLevels.count`.
      guide_params: parameters of the guiding checkpoint (autoguidance); None: no such checkpoint.
      guide_config: its configuration.
      classifier_params: parameters of the classifier that guides; None: none does.
      classifier_config: its configuration.
    """
    labels, scale = step_inputs.labels, step_inputs.classifier_scale
    classes = None
    if classifier_config is not None and labels is not None and scale is not None:
        trained = TrainedClassifier(classifier_config, classifier_params)
        classes = ClassGuidance(trained, labels, scale)
    denoise = make_denoiser(
        Stage(config, params),
        step_inputs.conditioning,
        negative=step_inputs.negative,
        guide=None if guide_config is None else Stage(guide_config, guide_params),
        guidance_weight=step_inputs.guidance_weight,
        classes=classes,
    )
    sampler = _edit_sampler(config, step_inputs)
    return samplers.denoise_steps(sampler, denoise, state, *levels, step_inputs.keys, first, last)
