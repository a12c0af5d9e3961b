"""A flipped bit in one replica is found and its device is named."""

import socket
import sys

import jax
import numpy as np
import pytest

from imagen_jax.parallel.checksums import checksum
from tests.reference.processes import finish, start

PROBE = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from imagen_jax.config.schema import MeshConfig
from imagen_jax.parallel import distributed, partitioning
from imagen_jax.parallel.checksums import Checksums, CorruptionError

distributed.initialize(lambda line: None)
mesh = partitioning.make_mesh(MeshConfig(fsdp=2))
rng = np.random.default_rng(0)
host = {"kernel": rng.normal(size=(6, 4)).astype(np.float32), "step": np.int32(7),
        "half": rng.normal(size=3).astype(jax.numpy.bfloat16)}
specs = {"kernel": P("fsdp"), "step": P(), "half": P()}
mesh_of = lambda name: NamedSharding(mesh, specs[name])


def place(flipped=None, bit=0):
    def leaf(name):
        shards = []
        shape = host[name].shape
        for device, index in mesh_of(name).addressable_devices_indices_map(shape).items():
            part = np.array(host[name][index])
            if flipped == (name, device.id):
                part.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
            shards.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(shape, mesh_of(name), shards)

    return {name: leaf(name) for name in host}


with jax.set_mesh(mesh):
    checksums = Checksums(mesh, place())
    checksums.compare(place(), "step 1")
    devices = [device.id for device in mesh.devices.flat]
    flips = ("kernel", 3, 0), ("kernel", 0, 31 + 64), ("half", 2, 15), ("step", 1, 30)
    for name, index, bit in flips:
        try:
            checksums.compare(place((name, devices[index]), bit), "step 2")
        except CorruptionError as error:
            print(f"{name} {index}: {error}")
        else:
            print(f"{name} {index}: not found")
"""


def lines_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if ": " in line and "step 2" in line]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_named(processes):
    """Four devices, fsdp=2: two replicas of `kernel`, four of `half` and `step`."""
    output = finish(start([sys.executable, "-c", PROBE], processes, 4 // processes))
    assert "not found" not in output
    kernel, other, half, step = lines_of(output)
    host = socket.gethostname()
    # Of two replicas, either may be the wrong one.
    assert "replicas of ['kernel'] differ, on one of " in kernel and kernel.count(host) == 2
    assert "replicas of ['kernel'] differ, on one of " in other
    for line, index in ((half, 2), (step, 1)):
        process = index * processes // 4
        assert f"of {host} (process {process}); replace that machine" in line
        assert "one of" not in line and line.count(host) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float16, np.uint8, np.bool_])
def test_one_bit_changes_the_checksum_wherever_it_is(dtype):
    x = (np.random.default_rng(1).normal(size=(5, 3)) * 9).astype(dtype)
    bits = 1 if dtype == np.bool_ else 8 * x.dtype.itemsize
    flipped = [x]
    for i in range(x.size):
        for bit in range(bits):
            y = x.copy()
            y.reshape(-1)[i : i + 1].view(np.uint8)[bit // 8] ^= 1 << bit % 8
            flipped.append(y)
    sums = np.asarray(jax.vmap(checksum)(np.stack(flipped)))
    assert (sums[1:] != sums[0]).all() and len(sums) == 1 + bits * x.size
