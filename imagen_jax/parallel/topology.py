"""TPU slices by Cloud TPU's names, and their devices for compilation without the slice.

libtpu compiles for a slice on a machine without TPUs. One JAX device is a chip on v4 and v5p
(megacore: both TensorCores), v5e and v6e; on tpu7x it is a TensorCore, half a chip.
"""

from __future__ import annotations

import difflib
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from imagen_jax.config.fields import ConfigError
from imagen_jax.parallel import gpu_targets
from imagen_jax.parallel.memory import GIB, Devices, local_devices

_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_3D = _CUBES | {256: "4x8x8", 512: "8x8x8", 768: "8x8x12", 1024: "8x8x16", 2048: "8x16x16"}


class Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
      libtpu: its name in libtpu.
      counted: increment per chip of the number in a slice's name: 2 (TensorCores) or 1 (chips).
      devices: JAX devices per chip.
      hbm: bytes per chip available to a program; slightly less than the datasheet's.
      shapes: number of chips -> shape of the slice.
    """

    libtpu: str
    counted: int
    devices: int
    hbm: int
    shapes: dict[int, str]


GENERATIONS = {
    "v4": Generation("v4", 2, 1, int(30.75 * GIB), _3D | {192: "4x4x12"}),
    "v5e": Generation("v5e", 1, 1, int(15.75 * GIB), _2D),
    "v5p": Generation(
        "v5p",
        2,
        1,
        int(95.74 * GIB),
        _3D
        | {192: "4x4x12", 320: "4x4x20", 384: "4x8x12", 1536: "8x12x16"}
        | {3072: "12x16x16", 4096: "16x16x16", 6144: "16x16x24"},
    ),
    "v6e": Generation("v6e", 1, 1, int(31.25 * GIB), _2D),
    "tpu7x": Generation("tpu7x", 2, 2, int(2 * 94.75 * GIB), _3D),
}
# Other names; v5litepod is Cloud TPU's accelerator type of v5e.
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}

# Without these, libtpu queries the metadata of the machine's TPU and locks it.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Slice(NamedTuple):
    """One or several TPU slices, or the devices of this machine.

    Attributes:
      name: the user's name of it.
      devices: JAX devices in libtpu's order.
      chips: number of chips, over all slices.
      hbm: bytes per chip available to a program.
      slices: number of slices, connected by the data-centre network.
    """

    name: str
    devices: list[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
    chips: int
    hbm: int
    slices: int = 1

    def as_devices(self) -> Devices:
        """All of them as the devices of one process."""
        count = len(self.devices)
        return Devices(self.devices[0].platform, count, self.hbm * self.chips // count)


def parse(name: str) -> tuple[Generation, int, int]:
    """The generation, the number of chips of a slice, and the number of slices of a name.

    Args:
      name: such as v4-128 (64 chips: the number counts TensorCores), v5e-256 (256 chips), or
        v5e-256x2 (two slices of 256 chips).

    Raises:
      ConfigError: there is no such slice; names the nearest.
    """
    family, _, number = name.partition("-")
    number, times, copies = number.partition("x")
    if times and not (copies.isdigit() and int(copies) >= 1):
        raise ConfigError(
            f"--topology={name!r}: {copies!r} must be a number of slices; try {family}-{number}x2"
        )
    family = ALIASES.get(family, family)
    if family not in GENERATIONS:
        names = [*GENERATIONS, *ALIASES]
        near = difflib.get_close_matches(family, names, n=1, cutoff=0.0)[0]
        near = ALIASES.get(near, near)
        count = int(number) if number.isdigit() else 0
        examples = [f"{f}-{_nearest(f, 64 * g.counted)}" for f, g in GENERATIONS.items()]
        raise ConfigError(
            f"--topology={name!r} is not a TPU slice, such as {', '.join(examples)}; "
            f"try {near}-{_nearest(near, count or 64)}"
        )
    generation = GENERATIONS[family]
    chips = int(number) / generation.counted if number.isdigit() else 0
    if chips not in generation.shapes:
        what = "TensorCores, two per chip" if generation.counted == 2 else "chips"
        sizes = ", ".join(str(n * generation.counted) for n in sorted(generation.shapes))
        raise ConfigError(
            f"--topology={name!r}: {family} slices have {sizes} {what}; "
            f"try {family}-{_nearest(family, int(number) if number.isdigit() else 64)}"
        )
    return generation, int(chips), int(copies or 1)


def _nearest(family: str, number: int) -> int:
    """The number in the name of the slice of `family` with the nearest size."""
    generation = GENERATIONS[family]
    return min((n * generation.counted for n in generation.shapes), key=lambda n: abs(n - number))


def open_slice(name: str) -> Slice:
    """The devices of the named slice or slices, or GPUs, for compilation only.

    Raises:
      ConfigError: there is no such slice, or libtpu or JAX's CUDA plugin is not installed.
    """
    if gpu_targets.is_gpu(name):
        devices, memory = gpu_targets.open_gpus(name)
        return Slice(name, devices, len(devices), memory)
    generation, chips, slices = parse(name)
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    options = {}
    if generation.libtpu == "v4":
        options["chip_config_name"] = "megacore"
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    layout = f"{generation.libtpu}:{generation.shapes[chips]}"
    try:
        described = topologies.get_topology_desc(layout, "tpu", **options)
    except Exception as error:  # JAX has no specific error for a missing or incompatible library.
        raise ConfigError(
            f"--topology={name}: libtpu cannot describe {layout} ({error}); "
            "is it installed: pip install 'imagen_jax[tpu]'"
        ) from error
    return Slice(name, described.devices, chips * slices, generation.hbm, slices)


def this_machine() -> Slice:
    """The devices of this machine, each counted as a chip; CPU devices share its memory."""
    devices = jax.devices()
    return Slice("here", devices, len(devices), local_devices().bytes)
