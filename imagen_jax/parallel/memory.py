"""Memory of the devices of this process, and what of it a program may take."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax

GIB = 2**30


class Devices(NamedTuple):
    """Equal devices that compute together.

    Attributes:
      platform: cpu, gpu or tpu.
      count: number of devices.
      bytes: memory of each that programs can use.
    """

    platform: str
    count: int
    bytes: int


def local_devices() -> Devices:
    """The devices of this process; CPU devices share the host's memory."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = stats.get("bytes_limit", host // len(devices))
    return Devices(devices[0].platform, len(devices), size)
