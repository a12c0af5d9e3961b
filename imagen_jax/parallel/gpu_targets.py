"""GPUs by name, and their devices for compilation without a GPU.

JAX's CUDA plugin compiles for a described GPU on a machine without one. Kernels are not tuned
(autotuning runs them), and the memory that cuDNN's convolutions work in is not counted.
"""

from __future__ import annotations

from typing import Any

from jax.experimental import topologies

from imagen_jax.config.fields import ConfigError

# What differs from `_HOPPER`: name, bytes of memory, bandwidth in bytes/s, bytes of L2 cache.
_H100 = ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, 52_428_800)
_H200 = ("NVIDIA H200", 150_754_820_096, 4_800_000_000_000, 62_914_560)
GPUS = {"h100": _H100, "h200": _H200}
COUNTS = (1, 2, 4, 8)
# Autotuning runs kernels on the GPU.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}

# XLA's GpuTargetConfigProto of a Hopper GPU.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 13 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


def is_gpu(name: str) -> bool:
    """Whether a `--topology` names GPUs, such as h200-8."""
    return name.partition("-")[0] in GPUS


def open_gpus(name: str) -> tuple[list[Any], int]:
    """JAX's devices of the named GPUs of one machine, for compilation only, and bytes of each.

    Args:
      name: such as h200-1 or h200-8.

    Raises:
      ConfigError: there is no such number of them, or JAX's CUDA plugin is not installed.
    """
    family, _, count = name.partition("-")
    if count not in map(str, COUNTS):
        numbers = ", ".join(map(str, COUNTS))
        raise ConfigError(
            f"--topology={name!r}: a machine has {numbers} of {family}; try {family}-{COUNTS[-1]}"
        )
    full, memory, bandwidth, cache = GPUS[family]
    target = _HOPPER.format(name=full, memory=memory, bandwidth=bandwidth, cache=cache)
    try:
        described = topologies.get_topology_desc(
            name, "cuda", target_config=target, topology=f"1x1x{count}"
        )
    except Exception as error:  # JAX has no specific error for a missing or incompatible plugin.
        raise ConfigError(
            f"--topology={name}: JAX's CUDA plugin cannot describe it ({error}); is it installed: "
            "pip install 'imagen_jax[cuda]'"
        ) from error
    return list(described.devices), memory
