"""Arrays that one replica of the mesh holds, copied to all replicas.

Parameters and optimizer state are replicated along the data axis. If every process had to read its
replica from a file system, each byte would be read once per replica; one replica reads, and the
network of the devices carries the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from imagen_jax.parallel import partitioning

# Bytes of whole arrays that one compiled program copies; bounds the memory beside the result.
CHUNK_BYTES = 2**30


def replica_mesh(mesh: Mesh) -> Mesh:
    """`mesh` with an axis `replica` in front, cut out of its first axis.

    The number of replicas is the largest at which every process has its devices in one of them.
    """
    grid = mesh.devices
    replicas = count_replicas(np.vectorize(lambda device: device.process_index, otypes=[int])(grid))
    shape = (replicas, grid.shape[0] // replicas, *grid.shape[1:])
    return Mesh(grid.reshape(shape), ("replica", *mesh.axis_names))


def count_replicas(processes: np.ndarray) -> int:
    """Parts of the first axis such that no process is in two; `processes`: of each device."""
    length = processes.shape[0]
    for replicas in range(length, 1, -1):
        if length % replicas == 0:
            owners = [set(part.flat) for part in np.split(processes, replicas)]
            if sum(map(len, owners)) == len(set().union(*owners)):
                return replicas
    return 1


def is_source(mesh: Mesh) -> bool:
    """Whether this process has devices of the replica that is read."""
    return any(device.process_index == jax.process_index() for device in mesh.devices[0].flat)


def source_sharding(sharding: NamedSharding, mesh: Mesh) -> NamedSharding:
    """`sharding`, over the first replica of `mesh` alone; its spec has no `replica` axis."""
    return NamedSharding(Mesh(mesh.devices[0], mesh.axis_names[1:]), sharding.spec)


def copy_to_all(
    arrays: Sequence[jax.Array] | None, abstract: Sequence[jax.ShapeDtypeStruct], mesh: Mesh
) -> list[jax.Array]:
    """Copies the arrays of the first replica to all; every process must call it.

    Args:
      arrays: with `source_sharding`; None in processes of other replicas.
      abstract: the result: shapes with NamedShardings over all devices, not sharded over replicas.
      mesh: from `replica_mesh`.

    Returns:
      Arrays with the shardings of `abstract`, equal to `arrays` bit for bit.
    """
    copies: list[jax.Array] = []
    for chunk in _chunks(abstract):
        leaves = [abstract[i] for i in chunk]
        given = [arrays[i] if arrays is not None else None for i in chunk]
        copies += _copy(given, leaves, mesh)
    return copies


def _chunks(abstract: Sequence[jax.ShapeDtypeStruct]) -> Iterator[list[int]]:
    """Indices of consecutive arrays with up to CHUNK_BYTES, at least one."""
    chunk, total = [], 0
    for index, leaf in enumerate(abstract):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if chunk and total + size > CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(index)
        total += size
    if chunk:
        yield chunk


def _copy(
    arrays: Sequence[jax.Array | None], abstract: Sequence[jax.ShapeDtypeStruct], mesh: Mesh
) -> list[jax.Array]:
    shardings = [NamedSharding(mesh, leaf.sharding.spec) for leaf in abstract]
    specs = [sharding.spec for sharding in shardings]

    def add_replicas(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        # The others hold zero bits, so the sum of the bits is the source's, -0.0 and NaN included.
        return [_from_bits(jax.lax.psum(_to_bits(x), "replica"), x.dtype) for x in arrays]

    with jax.set_mesh(mesh):
        # Replicas differ here, which shard_map, a program per device, may see.
        program = jax.jit(
            jax.shard_map(add_replicas, in_specs=(specs,), out_specs=specs, check_vma=False),
            donate_argnums=partitioning.donated(0),
            compiler_options=partitioning.FAST_COMPILE_OPTIONS,
        )
        parts = [_or_zeros(*each) for each in zip(arrays, abstract, shardings, strict=True)]
        copied = program(parts)
    return [_rename_mesh(x, leaf.sharding) for x, leaf in zip(copied, abstract, strict=True)]


def _or_zeros(
    array: jax.Array | None, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    """The shards that this process holds of the source, and zeros on its other devices."""
    held = {s.device: s.data for s in array.addressable_shards} if array is not None else {}
    shape = sharding.shard_shape(leaf.shape)
    shards = []
    for device in sharding.addressable_devices:
        shards.append(
            held[device] if device in held else jax.device_put(np.zeros(shape, leaf.dtype), device)
        )
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _rename_mesh(array: jax.Array, sharding: Any) -> jax.Array:
    """The same buffers, with a sharding over the same devices in the same order."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _to_bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return bits.astype(jnp.bool_)
    return jax.lax.bitcast_convert_type(bits, dtype)
