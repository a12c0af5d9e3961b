"""Memory of a training step on CPUs: kept by the process instead of returned after every step.

XLA allocates the temporaries of a program at every run. glibc takes large blocks from the system
and returns them when they are freed, so the system clears the same pages again in each step.
"""

from __future__ import annotations

import ctypes
import sys

import jax

# malloc.h: blocks of this size or more are taken from the system one by one; memory at the end of
# the heap beyond this size is returned.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_BLOCK, _HEAP = 1 << 30, (1 << 31) - 1  # Bytes.


def keep_freed() -> bool:
    """Lets this process keep freed blocks of up to 1 GiB, where JAX's devices are CPUs.

    Returns:
      Whether it does; not on accelerators, nor with another C library than glibc.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK) and mallopt(_M_TRIM_THRESHOLD, _HEAP))
