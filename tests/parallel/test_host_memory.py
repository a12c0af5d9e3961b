"""parallel/host_memory.py: freed memory is used again without the system clearing it."""

import subprocess
import sys

FAULTS = """
import resource, sys
from imagen_jax.parallel import host_memory
kept = sys.argv[1] == "kept" and host_memory.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(64 << 20); block[::4096] = bytes(len(block[::4096])); del block
before = faults()
for _ in range(5):
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    del block
print(kept, faults() - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    """Whether memory is kept, and page faults of five blocks of 64 MiB, one after the other."""
    command = [sys.executable, "-c", FAULTS, mode]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return said[0] == "True", int(said[1])


def test_large_blocks_are_kept():
    kept, few = faults("kept")
    _, many = faults("returned")
    assert kept  # On Linux with glibc, where the wheels of JAX run.
    assert many >= 5 * (64 << 20) // (2 << 20) and few < many / 10
