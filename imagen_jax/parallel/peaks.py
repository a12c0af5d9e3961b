"""Peaks of accelerators by JAX's name of the device, for MFU (training) and planning."""

import math
from typing import NamedTuple

# Dense bfloat16 peak of one device by `device_kind`, FLOP/s, from the makers' datasheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # A device is one of the chip's two TensorCores.
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, FLOP/s; None for an unknown device.

    JAX names GPUs by their full product name, so the longest matching prefix decides.
    """
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class Peaks(NamedTuple):
    """What one device can do at most.

    The last six are a CPU's. On TPUs vector units keep pace with memory unless an element takes
    tens of operations, calls run ahead of the device, and starts of operations have no published
    figure.

    Attributes:
      flops: FLOP/s of products; of accelerators dense in bfloat16.
      hbm: bytes/s of its memory.
      ici: bytes/s of one link to another chip, in one direction.
      dcn: bytes/s of its share of the data-centre network.
      ring: chips along a side of the torus, or a multiple, from which on its ends are linked.
      plain: elements/s of additions, multiplications and the like.
      functions: elements/s of exp, tanh and the like.
      windows: elements/s at which a convolution copies its windows to multiply them, with the zeros
        of padding and dilation; inf: it copies none and multiplies none of these zeros.
      start: seconds that an operation takes to start.
      argument: seconds that a call takes for each array passed to it.
      result: the same for each array returned.
    """

    flops: float
    hbm: float
    ici: float
    dcn: float
    ring: int = 1
    plain: float = math.inf
    functions: float = math.inf
    windows: float = math.inf
    start: float = 0.0
    argument: float = 0.0
    result: float = 0.0


# From Cloud TPU's pages of each generation: HBM; ICI per chip in one direction, over its ports (4
# of a 2D torus, 6 of a 3D one); the data-centre network, per chip or pod (v4: as v5p); sides that
# are rings: multiples of 4 on 3D tori, 16 on 2D ones.
_BANDWIDTHS = {
    "TPU v4": (1228e9, 300e9 / 6, 6.25e9, 4),
    "TPU v5 lite": (819e9, 200e9 / 4, 3.125e9, 16),
    "TPU v5": (2765e9, 600e9 / 6, 6.25e9, 4),
    "TPU v5p": (2765e9, 600e9 / 6, 6.25e9, 4),
    "TPU v6 lite": (1600e9, 400e9 / 4, 12.5e9, 16),
}


def of(device_kind: str) -> Peaks | None:
    """The peaks of a device; None for one whose bandwidths are unknown."""
    if device_kind not in _BANDWIDTHS:
        return None
    return Peaks(PEAK_FLOPS[device_kind], *_BANDWIDTHS[device_kind])
