"""Any number of pictures of one stage: batch by batch, over the devices of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing
from imagen_jax.diffusion.editing import Edit
from imagen_jax.diffusion.samplers import Denoising
from imagen_jax.inference import stage_sampler
from imagen_jax.parallel import partitioning

Report = Callable[[tuple[int, int], int, int, Array], None]


class Asked(NamedTuple):
    """N pictures that a stage is asked for.

    Attributes:
      text_emb: [N, L, D] embeddings of the prompts.
      text_mask: [N, L], True at real tokens.
      keys: [N], from `stage_keys`.
      lowres: SR stages: [N, h, w, 3], the pictures of the stage before, in [-1, 1].
      negative: embeddings and mask of what to lead away from, shaped as the text; None: no text.
      edit: pictures to start from; None: from noise.
    """

    text_emb: np.ndarray
    text_mask: np.ndarray
    keys: Array
    lowres: np.ndarray | None = None
    negative: tuple[np.ndarray, np.ndarray] | None = None
    edit: Edit | None = None

    def rows(self, rows: np.ndarray) -> Asked:
        """Some of them."""
        some = jax.tree.map(lambda value: value[rows], self._replace(edit=None))
        return some._replace(edit=self.edit and self.edit.rows(rows))


@functools.cache
def programs() -> tuple[Callable[..., Any], Callable[..., Denoising]]:
    """`begin` and `advance` as they are compiled for the devices of this process."""
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Eigen's threads split sums in ways that differ between CPU devices by rounding; where
        # there are several of these, they take the threads' place, whatever mesh is in force now.
        options = {"xla_cpu_multi_thread_eigen": False}
    else:
        options = partitioning.forward_options()
    begin = jax.jit(stage_sampler.begin, static_argnames="config", compiler_options=options)
    advance = jax.jit(
        stage_sampler.advance, static_argnames=("config", "guide_config"), compiler_options=options
    )
    return begin, advance


def draw(
    params: Any,
    config: Config,
    asked: Asked,
    *,
    batch_size: int,
    guide: tuple[Any, Config] | None = None,
    report: Report | None = None,
    report_every: int = 1,
) -> Float[np.ndarray, "n size size 3"]:
    """One stage's pictures, batch by batch over the devices of this process.

    Args:
      params: plain parameters, on all these devices.
      config: the stage, with how it draws.
      asked: what to draw.
      batch_size: pictures drawn at a time, rounded up to a multiple of the devices; the last batch
        is filled up.
      guide: parameters and stage of the checkpoint that guides it; None: none does.
      report: given the rows being drawn, their steps done, all steps, and x0 on the devices, while
        the next steps run.
      report_every: steps between two reports.

    Returns:
      Pictures in [-1, 1], on this host.
    """
    parts, count = [], len(asked.text_emb)
    devices = jax.local_device_count()
    size = -(-min(batch_size, count) // devices) * devices
    for first in range(0, count, size):
        end = min(first + size, count)
        part = asked.rows(np.minimum(np.arange(first, first + size), count - 1))
        on_steps = functools.partial(report, (first, end)) if report else None
        pictures = _sample_batch(params, config, part, guide, on_steps, report_every)
        parts.append(pictures[: end - first])
    return np.concatenate(parts)


def _sample_batch(
    params: Any,
    config: Config,
    asked: Asked,
    guide: tuple[Any, Config] | None,
    report: Callable[[int, int, Array], None] | None,
    report_every: int,
) -> Float[np.ndarray, "b size size 3"]:
    settings, edit = config.sampling, asked.edit
    aug_level, edited, mask = None, None, None
    if asked.lowres is not None:
        aug_level = np.full(len(asked.lowres), settings.aug_level, np.float32)
    if edit is None:
        plan = stage_sampler.levels(config)
    else:
        plan = stage_sampler.levels(config, edit.strength, edit.resamplings, edit.jump)
        known, mask = editing.sized(edit, config.data.image_size)
        edited = known, np.full(len(known), plan.logsnr_t[0], np.float32)
    guide_params, guide_config = guide or (None, None)
    start, run = programs()
    weight = np.full(len(asked.keys), settings.guidance_weight, np.float32)
    given = (*asked[:4], aug_level, weight, asked.negative, edited, mask)
    told, at = start(stage_sampler.shared(config), *partitioning.spread(given))
    stride, waiting = report_every if report else plan.count, None
    for first in range(0, plan.count, stride):
        last = min(first + stride, plan.count)
        bounds = (plan[:2], first, last)
        at = run(
            params, stage_sampler.shared(config), told, at, *bounds, guide_params, guide_config
        )
        # Waited for only when the next steps are under way.
        if report and waiting:
            report(waiting[0], plan.count, jax.block_until_ready(waiting[1]))
        waiting = last, at.x0
    x0 = np.clip(np.asarray(at.x0), -1.0, 1.0)
    if report:
        report(plan.count, plan.count, at.x0)
    return x0 if edited is None or mask is None else np.where(mask, x0, edited[0])
