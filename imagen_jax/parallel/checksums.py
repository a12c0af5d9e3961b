"""Silent corruption: replicas of an array that should be equal bit for bit are compared.

A memory or a core that computes wrong values makes one replica drift from the others, and nothing
fails. Every device computes a checksum of each of its shards; the checksums of devices that hold
the same part of an array must be equal.
"""

from __future__ import annotations

import collections
import socket
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from imagen_jax.parallel import distributed, partitioning


class CorruptionError(ValueError):
    """Replicas of an array differ; the message names host and device."""


class Checksums:
    """Compares the replicas of one kind of tree on a mesh."""

    def __init__(self, mesh: Mesh, tree: Any):
        """Args: mesh: of the run. tree: arrays or shapes with NamedShardings over all of it."""
        self._mesh = mesh
        self._names = [jax.tree_util.keystr(path) for path, _ in _leaves(tree)]
        self._groups = [_replicas(leaf, mesh) for _, leaf in _leaves(tree)]
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, tree)

        def of_shards(shards: Any) -> jax.Array:
            return jnp.stack([checksum(x) for x in jax.tree.leaves(shards)])[None]

        # Replicas may differ here, which shard_map, a program per device, can see.
        by_device = jax.shard_map(
            of_shards,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
        self._compute = jax.jit(
            by_device,
            out_shardings=partitioning.replicated(mesh),
            compiler_options=partitioning.FAST_COMPILE_OPTIONS,
        )

    def compare(self, tree: Any, what: str) -> None:
        """Raises CorruptionError, in every process, if replicas differ; all must call it.

        Args:
          tree: the arrays.
          what: for the message, such as "step 100".
        """
        if not any(self._groups):
            return
        sums = np.asarray(jax.device_get(self._compute(tree)))  # [devices, arrays]
        for array, groups in enumerate(self._groups):
            for group in groups:
                if len(set(sums[group, array].tolist())) > 1:
                    raise CorruptionError(self._describe(array, group, sums[group, array], what))

    def _describe(self, array: int, group: Sequence[int], sums: np.ndarray, what: str) -> str:
        hosts = distributed.share(socket.gethostname())
        ((common, votes), *others) = collections.Counter(sums.tolist()).most_common()
        tie = any(count == votes for _, count in others)
        devices = [self._mesh.devices.flat[i] for i in group]
        odd = [d for d, total in zip(devices, sums, strict=True) if tie or int(total) != common]
        names = [f"{d} of {hosts[d.process_index]} (process {d.process_index})" for d in odd]
        which = "one of " if tie else ""
        return (
            f"{what}: the replicas of {self._names[array]} differ, on {which}{', '.join(names)}; "
            "replace that machine; checkpoints since the last comparison may be damaged"
        )


def checksum(x: jax.Array) -> jax.Array:
    """Sum of the words of `x` times odd numbers, modulo 2**32; one flipped bit changes it."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else _bits(x)
    words = bits.astype(jnp.uint32).reshape(-1)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _replicas(leaf: Any, mesh: Mesh) -> list[list[int]]:
    """Groups of two devices or more, by position in the mesh, that hold the same part of `leaf`."""
    order = {device: i for i, device in enumerate(mesh.devices.flat)}
    groups = collections.defaultdict(list)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        groups[str(index)].append(order[device])
    return [sorted(group) for group in groups.values() if len(group) > 1]
