"""Images that a stage samples at a time: as many as the devices' memory has room for."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from imagen_jax.inference.stage_sampler import SamplerInputs
from imagen_jax.parallel import liveness
from imagen_jax.parallel.memory import GIB, Devices
from imagen_jax.stages.classifier import TrainedClassifier
from imagen_jax.stages.stage import Stage

# Left for the compiler's own buffers, gathered layers and fragmentation.
RESERVE = 0.1

# Bytes of the activations of a program by its configurations and shapes: counting them takes longer
# than a small batch.
NEEDS: dict[Any, int] = {}


class OutOfMemoryError(MemoryError):
    """A stage's program does not fit the devices; the message is one line with the remedy."""


def bytes_per_device(params: Any) -> int:
    """Bytes of placed parameters on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params)
    )


def fitting(
    programs: tuple[Any, Any],
    stage: Stage,
    others: tuple[Stage | None, TrainedClassifier | None],
    arrays: SamplerInputs,
    *,
    levels: Any,
    parts: int,
    room: int,
) -> int:
    """Images at a time, at most those of `arrays`, whose activations have room.

    Args:
      programs: `batches.programs()`. JAX keeps their traces for later calls of equal shapes.
      stage: configuration from `jit_cache_config`, and its parameters.
      others: the guiding checkpoint and the guiding classifier.
      arrays: of one batch.
      levels: noise levels of the steps.
      parts: devices over which a batch is sharded; the result is a multiple of it.
      room: bytes per device.
    """
    size = len(arrays.keys)
    leaves, structure = jax.tree.flatten((arrays, levels))
    shapes = tuple((np.shape(leaf), leaf.dtype) for leaf in leaves)
    key = (stage.config, *(other and other.config for other in others), structure, shapes)
    if key not in NEEDS:
        NEEDS[key] = _activation_bytes(programs, stage, others, arrays, levels)
    need = NEEDS[key] / (parts * stage.config.sampling.height)
    if need <= room:
        return size
    return max(int(max(room, 0) / need * size) // parts * parts, parts)


def guide_arguments(guide: Stage | None, classifier: TrainedClassifier | None) -> dict[str, Any]:
    """The arguments of `run_steps` of a guiding checkpoint and a guiding classifier."""
    arguments: dict[str, Any] = {}
    if guide is not None:
        arguments |= {"guide_params": guide.params, "guide_config": guide.config}
    if classifier is not None:
        config = classifier.config
        arguments |= {"classifier_params": classifier.params, "classifier_config": config}
    return arguments


def _activation_bytes(
    programs: tuple[Any, Any],
    stage: Stage,
    others: tuple[Stage | None, TrainedClassifier | None],
    arrays: SamplerInputs,
    levels: Any,
) -> int:
    """Bytes on all devices together; arguments as those of `fitting`."""
    init, run = programs
    step_inputs, start = init.trace(stage.config, arrays).out_info
    place = (stage.params, stage.config, step_inputs, start, levels, 0, 1)
    traced = run.trace(*place, **guide_arguments(*others))
    return liveness.peak_bytes(traced.jaxpr.jaxpr)


def out_of_memory(
    stage: Stage, size: int, parts: int, devices: Devices, error: Exception
) -> OutOfMemoryError:
    """The error of a stage whose program did not fit: what it needs, and the next remedy.

    Args:
      stage: configuration of `placement.with_placement`, and placed parameters.
      size: images at a time.
      parts: devices over which they are sharded.
      devices: of the process.
      error: of the compiler or the device; has the bytes.
    """
    config, settings = stage.config, stage.config.sampling
    advice = "set sampling.{} for the stage, see --stage_settings"
    if size > parts:
        remedy = advice.format(f"batch_size={max(size // 2 // parts, 1) * parts}")
    elif config.model.dtype != "bfloat16":
        remedy = advice.format('dtype="bfloat16"')
    elif settings.height == 1 and (settings.fsdp or 1) < devices.count:
        remedy = advice.format(f"fsdp={devices.count}")
    elif settings.height < devices.count:
        remedy = advice.format(f"fsdp=1 and sampling.height={devices.count}")
    else:
        remedy = "use more devices, or devices with more memory"
    reason = str(error).strip().splitlines()[0][:200]
    return OutOfMemoryError(
        f"stage {config.name!r}: out of memory with {size} images at a time on {devices.count} "
        f"devices of {devices.bytes / GIB:.4g} GiB; its parameters take "
        f"{bytes_per_device(stage.params) / GIB:.4g} GiB of each ({reason}); {remedy}"
    )
