"""Any number of images of one stage: batch by batch, over the devices of this process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing
from imagen_jax.diffusion.editing import Edit
from imagen_jax.diffusion.samplers import DenoisingState
from imagen_jax.inference import placement, stage_sampler
from imagen_jax.inference.batch_size import fitting, guide_arguments, out_of_memory
from imagen_jax.inference.stage_sampler import Noise, SamplerInputs
from imagen_jax.parallel import memory, partitioning
from imagen_jax.stages.classifier import TrainedClassifier
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.stage import Stage


class StageInputs(NamedTuple):
    """N images that a stage is to sample, on this host.

    Attributes:
      text: embeddings and mask of the prompts.
      keys: [N], from `stage_keys`.
      lowres: SR stages: [N, h, w, 3], the images of the stage before, in [-1, 1].
      negative: embeddings and mask of the negative prompts, shaped as the text; None: null text.
      edit: images to start from; None: from noise.
      noise: given noise, in place of that of the keys.
      labels: [N, K], classes for the classifier; None: no classifier.
      classifier_scale: [N], with labels.
    """

    text: Text
    keys: Array
    lowres: np.ndarray | None = None
    negative: Text | None = None
    edit: Edit | None = None
    noise: Noise = Noise()
    labels: np.ndarray | None = None
    classifier_scale: np.ndarray | None = None

    def rows(self, rows: np.ndarray) -> StageInputs:
        """The inputs of some of the images."""
        some = jax.tree.map(lambda value: value[rows], self._replace(edit=None))
        return some._replace(edit=self.edit and self.edit.rows(rows))


class StepReport(NamedTuple):
    """Progress within one batch, reported while the next steps run.

    Attributes:
      rows: first row and row after the last one that are being sampled.
      step: steps that are done.
      steps: steps in all.
      x0: [b, size, size, 3], estimate by the last step, on the devices.
    """

    rows: tuple[int, int]
    step: int
    steps: int
    x0: Array


StepCallback = Callable[[StepReport], None]


class NotFiniteError(ArithmeticError):
    """An image holds NaN or infinity, which would be saved as black."""


@functools.cache
def programs() -> tuple[Callable[..., Any], Callable[..., DenoisingState]]:
    """`init_denoising` and `run_steps`, jitted for the devices of this process."""
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Eigen's threads split sums in ways that differ between CPU devices by rounding. With
        # several CPU devices these run in parallel instead, whatever mesh is active.
        options = {"xla_cpu_multi_thread_eigen": False}
    else:
        options = partitioning.forward_options()
    init = jax.jit(stage_sampler.init_denoising, static_argnames="config", compiler_options=options)
    run = jax.jit(
        stage_sampler.run_steps,
        static_argnames=("config", "guide_config", "classifier_config"),
        compiler_options=options,
    )
    return init, run


def sample_batches(
    stage: Stage,
    inputs: StageInputs,
    *,
    batch_size: int,
    guide: Stage | None = None,
    classifier: TrainedClassifier | None = None,
    on_steps: StepCallback | None = None,
    report_every: int = 1,
    numbers: Int[np.ndarray, " n"] | None = None,
    room: int | None = None,
) -> Float[np.ndarray, "n size size 3"]:
    """One stage's images, batch by batch over the devices of this process.

    Args:
      stage: configuration, and parameters placed as its `sampling` says, see `placement`.
      inputs: of N images.
      batch_size: images sampled at a time, rounded up to a multiple of the devices; the last batch
        is padded to it.
      guide: the checkpoint that guides (autoguidance); None: classifier-free guidance.
      classifier: guides to the labels of `inputs`; None: none does.
      on_steps: called with the progress of the batch while the next steps run.
      report_every: steps between two calls of it.
      numbers: of the images, for messages; None: 0 to N-1.
      room: bytes of a device that activations may take; batches are smaller where these need more.
        None: any.

    Returns:
      Images in [-1, 1], on this host; beyond it only where the last step has given noise.

    Raises:
      NotFiniteError: an image is not finite; names stage, image and step.
      OutOfMemoryError: a batch does not fit; names stage, need and remedy.
    """
    parts, count = [], len(inputs.text.emb)
    numbers = np.arange(count) if numbers is None else numbers
    mesh = placement.make_mesh(stage.config.sampling)
    devices = partitioning.batch_devices(mesh) if mesh else jax.local_device_count()
    most = min(batch_size, stage.config.sampling.batch_size or batch_size, count)
    size = -(-most // devices) * devices
    rows = lambda first: np.minimum(np.arange(first, first + size), count - 1)  # noqa: E731
    active = jax.set_mesh(mesh) if mesh else contextlib.nullcontext()
    with active:
        first_part = inputs.rows(rows(0))
        if room is not None and stage.config.sampling.batch_size is None:
            fits = _fitting_size(stage, first_part, guide, classifier, devices, room)
            if fits != size:
                size = fits
                first_part = inputs.rows(rows(0))
        for first in range(0, count, size):
            end = min(first + size, count)
            part = inputs.rows(rows(first)) if first else first_part
            try:
                sampled = _sample_batch(
                    stage, part, (guide, classifier), (first, end), on_steps, report_every
                )
            except _NotFinite as found:
                image = int(numbers[min(first + found.row, end - 1)])
                raise NotFiniteError(_not_finite_line(stage, guide, image, found)) from None
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found = memory.local_devices()
                raise out_of_memory(stage, size, devices, found, error) from error
            parts.append(sampled[: end - first])
    return np.concatenate(parts)


def _fitting_size(
    stage: Stage,
    inputs: StageInputs,
    guide: Stage | None,
    classifier: TrainedClassifier | None,
    devices: int,
    room: int,
) -> int:
    """Images at a time, at most those of `inputs`."""
    arrays, _, levels = _sampler_inputs(stage.config, inputs)
    stage = Stage(stage_sampler.jit_cache_config(stage.config), stage.params)
    others = (guide, classifier)
    return fitting(programs(), stage, others, arrays, levels=levels, parts=devices, room=room)


def _sampler_inputs(config: Config, inputs: StageInputs) -> tuple[SamplerInputs, int, Any]:
    """Arrays for one batch, the number of its steps, and their noise levels."""
    settings, count, edit = config.sampling, len(inputs.keys), inputs.edit
    arrays = SamplerInputs(
        text=inputs.text,
        keys=inputs.keys,
        lowres=inputs.lowres,
        guidance_weight=np.full(count, settings.guidance_weight, np.float32),
        negative=inputs.negative,
        noise=inputs.noise,
        labels=inputs.labels,
        classifier_scale=inputs.classifier_scale,
    )
    if inputs.lowres is not None:
        arrays = arrays._replace(aug_level=np.full(count, settings.aug_level, np.float32))
    if edit is None:
        levels = stage_sampler.noise_levels(config)
    else:
        levels = stage_sampler.noise_levels(config, edit.strength, edit.resamplings, edit.jump)
        init_images, mask = editing.resize_edit(edit, config.data.image_size)
        init_logsnr = np.full(count, levels.logsnr_t[0], np.float32)
        arrays = arrays._replace(init_images=init_images, init_logsnr=init_logsnr, mask=mask)
    return arrays, levels.count, levels[:2]


def _sample_batch(
    stage: Stage,
    inputs: StageInputs,
    others: tuple[Stage | None, TrainedClassifier | None],
    rows: tuple[int, int],
    on_steps: StepCallback | None,
    report_every: int,
) -> Float[np.ndarray, "b size size 3"]:
    arrays, count, levels = _sampler_inputs(stage.config, inputs)
    config = stage_sampler.jit_cache_config(stage.config)
    guides = guide_arguments(*others)
    init, run = programs()

    def advance(state: Any, first: int, last: int) -> Any:
        return run(stage.params, config, step_inputs, state, levels, first, last, **guides)

    step_inputs, start = init(config, _place(arrays))
    state, stride, finished = start, report_every if on_steps else count, None
    for first in range(0, count, stride):
        last = min(first + stride, count)
        state = advance(state, first, last)
        # Blocks only when the next steps have been dispatched.
        if on_steps and finished:
            on_steps(finished._replace(x0=jax.block_until_ready(finished.x0)))
        finished = StepReport(rows, last, count, state.x0)
    given = inputs.noise.steps
    x0 = np.asarray(state.x0)
    if not np.isfinite(x0).all():
        raise _not_finite(start, advance, count)
    if given is not None and given.shape[1] == count:  # The last step adds noise, too.
        return np.asarray(state.z)
    x0 = np.clip(x0, -1.0, 1.0)
    if on_steps and finished:
        on_steps(finished)
    if arrays.mask is None or arrays.init_images is None:
        return x0
    return np.where(arrays.mask, x0, arrays.init_images)


def _place(arrays: SamplerInputs) -> SamplerInputs:
    """The arrays over the active mesh, or over all devices of the process."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return partitioning.shard_batch(arrays)
    return jax.device_put(arrays, partitioning.batch_sharding(mesh))


class _NotFinite(Exception):
    """An image of a batch is not finite.

    Attributes:
      row: in the batch.
      step: the first one whose estimate of x0 is not finite, from 1.
      steps: steps in all.
    """

    def __init__(self, row: int, step: int, steps: int):
        super().__init__()
        self.row, self.step, self.steps = row, step, steps


def _not_finite(start: DenoisingState, advance: Callable[..., Any], count: int) -> _NotFinite:
    """Runs a batch again, step by step, up to the first estimate that is not finite."""
    state = start
    for step in range(count):
        state = advance(state, step, step + 1)
        finite = np.isfinite(np.asarray(state.x0)).all(axis=(1, 2, 3))
        if not finite.all():
            break
    # On a device whose errors come and go, the second run may be finite.
    return _NotFinite(int(np.argmin(finite)), step + 1, count)


def _not_finite_line(stage: Stage, guide: Stage | None, image: int, found: _NotFinite) -> str:
    config = stage.config
    line = (
        f"stage {config.name!r}: image {image} is not finite from step {found.step} of "
        f"{found.steps} on"
    )
    for which, part in (("", stage), ("guide's ", guide)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part.params if part else {}):
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                name = "/".join(str(key.key) for key in path)
                return f"{line}: the {which}parameter {name} is not; export the stage again"
    return (
        f"{line}, though its parameters are: try a smaller guidance_weight than "
        f"{config.sampling.guidance_weight:g}, or model.dtype=float32"
    )
