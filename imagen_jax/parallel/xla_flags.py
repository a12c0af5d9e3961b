"""Flags of XLA for TPUs and GPUs, each with its reason; set before JAX starts.

`imagen` sets them for every verb, so every launcher has them, and `imagen doctor` prints them. A
flag that the user's environment sets keeps the user's value. None has been timed on an accelerator;
the tests check that the installed compilers know each one. An unknown flag ends the process: with
another libtpu or jaxlib, IMAGEN_NO_XLA_FLAGS names those not to set, by commas, or `all`.

TPUs: libtpu alone reads LIBTPU_INIT_ARGS. Autotuning needs no flag there: libtpu has its tables.
GPUs: XLA reads XLA_FLAGS in every process; they are set where JAX's CUDA plugin is installed.
CPUs: there is nothing to overlap.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from imagen_jax.config.fields import ConfigError, unknown_name


class Flag(NamedTuple):
    """A flag of XLA, and why it has this value."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


TPU = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "orders operations so that computation fills the time of a collective",
    ),
    Flag(
        "xla_enable_async_all_gather",
        "true",
        "parameters sharded over mesh.fsdp are gathered beside the layer before",
    ),
    Flag(
        "xla_enable_async_collective_permute",
        "true",
        "neighbours of a convolution sharded in height arrive beside its inner rows",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "a collective runs within a fusion of convolutions or products, not before it",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        "the same for the all-gathers of mesh.fsdp, the most frequent collective",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "a long collective spans several fusions: kernels of the wide levels take longer than one",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "the TensorCore computes while its collective is under way",
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "gradients cross the data axis, and with several slices DCN, beside the backward pass",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "the same for gradients of unequal sizes, as those of a U-Net's levels are",
    ),
)
GPU = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "orders operations so that kernels fill the time of a collective",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        "with train.accumulation, parameters of the next part are gathered beside this one",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        "the same for gradients sharded over mesh.fsdp",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        "true",
        "the same for gradients over the data axis",
    ),
    Flag(
        "xla_gpu_autotune_level",
        "4",
        "kernels of convolutions and products are chosen by timing, and their results compared",
    ),
)
VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}
# The plugins of JAX's extras cuda13 and cuda12.
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
OMITTED = "IMAGEN_NO_XLA_FLAGS"


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags to the environment, but those that it sets or omits; before JAX uses a device.

    Raises:
      ConfigError: OMITTED names no flag of this module.
    """
    omitted = [name for name in environment.get(OMITTED, "").split(",") if name]
    if omitted == ["all"]:
        return
    known = [flag.name for flag in (*TPU, *GPU)]
    for name in omitted:
        if name not in known:
            raise ConfigError(unknown_name(OMITTED, name, ["all", *known]))
    _add(environment, VARIABLES["tpu"], [flag for flag in TPU if flag.name not in omitted])
    if any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        _add(environment, VARIABLES["gpu"], [flag for flag in GPU if flag.name not in omitted])


def _add(environment: MutableMapping[str, str], variable: str, flags: Sequence[Flag]) -> None:
    given = environment.get(variable, "")
    names = set(re.findall(r"(?:^|\s)--?(?:no)?(\w+)", given))
    words = [str(flag) for flag in flags if flag.name not in names]
    environment[variable] = " ".join([*words, given]).strip()


def in_force(platform: str) -> str:
    """Variable and flags of a platform as this process has them, in one line.

    Args:
      platform: of JAX's devices: tpu, gpu or cpu.
    """
    variable = VARIABLES.get(platform, VARIABLES["gpu"])
    given = os.environ.get(variable, "")
    return f"{variable}={given}" if given else f"no flags of XLA for {platform}"
