"""Where the parameters of a cascade are in sampling: their dtype, their devices, how long.

Parameters take at most PARAMS_SHARE of a device's memory, where this is possible: one copy per
device, or one copy shared by all devices of the process (as `mesh.fsdp` in training), or that of
one stage at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.config.text import T5Config
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.memory import Devices
from imagen_jax.stages import network

# The rest is for activations.
PARAMS_SHARE = 0.5

Keep = Literal["all", "one"]


def with_dtype(config: Config, platform: str) -> Config:
    """The configuration whose `model.dtype` is the dtype of sampling on `platform`."""
    dtype = config.sampling.dtype or ("float32" if platform == "cpu" else "bfloat16")
    if config.model.dtype == config.sampling.dtype == dtype:
        return config  # A new one would be checked again.
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype),
        sampling=dataclasses.replace(config.sampling, dtype=dtype),
    )


def param_dtype(shape: Sequence[int], dtype: str) -> Any:
    """The dtype of a parameter of that shape; vectors (norms, biases) are float32."""
    return jnp.dtype(dtype if len(shape) > 1 else "float32")


def choose_keep(sizes: Sequence[int], devices: Devices) -> Keep:
    """Whether the parameters of all networks have room on the devices at once.

    Args:
      sizes: bytes of the networks' parameters: stages, guides, text encoder.
      devices: of the process.
    """
    room = PARAMS_SHARE * devices.bytes * devices.count
    return "all" if sum(sizes) <= room else "one"


def choose_fsdp(size: int, sizes: Sequence[int], keep: Keep, devices: Devices) -> int:
    """Devices that share one copy of a network's parameters.

    Args:
      size: bytes of the parameters.
      sizes: of all networks.
      keep: "all": they are on the devices together.
      devices: of the process.
    """
    together = sum(sizes) if keep == "all" else size
    return 1 if together <= PARAMS_SHARE * devices.bytes else devices.count


def with_placement(
    configs: Sequence[Config], sizes: Sequence[int], keep: Keep, devices: Devices
) -> list[Config]:
    """Configurations in which `sampling.fsdp` is a number.

    Args:
      configs: of the stages.
      sizes: bytes of their parameters, then of the other networks.
      keep: as of `choose_fsdp`.
      devices: of the process.
    """
    placed = []
    for config, size in zip(configs, sizes, strict=False):
        settings = config.sampling
        fsdp = settings.fsdp
        if fsdp is None:
            whole = settings.height > 1  # Each device needs all parameters.
            fsdp = 1 if whole else choose_fsdp(size, sizes, keep, devices)
        sampling = dataclasses.replace(settings, fsdp=fsdp)
        placed.append(dataclasses.replace(config, sampling=sampling))
    return placed


def make_mesh(
    settings: SamplingConfig,
    devices: Sequence[jax.Device] = (),  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh | None:
    """The mesh of a stage; None: every device has all parameters and whole images.

    Args:
      settings: of `with_placement`.
      devices: (): those of this process.

    Raises:
      ConfigError: fsdp * height does not divide the number of devices.
    """
    fsdp = settings.fsdp or 1
    if fsdp == settings.height == 1:
        return None
    return partitioning.sampling_mesh(
        devices or jax.local_devices(), fsdp=fsdp, height=settings.height
    )


def param_bytes(config: Config) -> int:
    """Bytes of a stage's parameters; `model.dtype` is of `with_dtype`."""
    return sum(
        math.prod(leaf.shape) * param_dtype(leaf.shape, config.model.dtype).itemsize
        for leaf in jax.tree.leaves(network.boxed_shapes(config))
    )


def encoder_bytes(shape: T5Config) -> int:
    """Bytes of the parameters of a T5 encoder."""
    leaves = jax.tree.leaves(t5.parameter_shapes(shape))
    return sum(math.prod(leaf.shape) for leaf in leaves) * jnp.dtype(shape.dtype).itemsize


def abstract_params(config: Config, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a stage's parameters on a `sampling_mesh`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, param_dtype(leaf.shape, config.model.dtype), sharding=leaf.sharding
        ),
        network.abstract_params(config, mesh),
    )
