"""Devices as a mesh, and arrays laid over it: logical axis names -> mesh axes by one table.

The mesh has the axes data (batch only), fsdp (batch and parameters) and tensor (channels, heads).
Layers name the axes of their parameters and of some activations; a new layer needs a row here only
if it brings a new name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import MeshConfig, ModelConfig

# Shardings can be planned for devices that are not here.
AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axis, or axes (None: not split)
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "embed": "fsdp",
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_height": None,
    "conv_width": None,
    "conv_in": "fsdp",
    "conv_out": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "channels": "tensor",
    "heads": "tensor",
}


# XLA's options. A program that runs once need not be fast, but it must be there soon.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 0}

# On CPUs XLA gives convolutions, products and reductions to a library, YNNPACK. Without it Eigen
# takes the convolutions, and is faster (docs/performance.md); so only these are given to it.
_LIBRARY = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


def forward_options() -> dict[str, Any]:
    """XLA's options for a program that only runs networks: on one CPU, Eigen's convolutions."""
    return dict(_LIBRARY) if platform() == "cpu" and _eigen_is_sound() else {}


def train_step_options() -> dict[str, Any]:
    """XLA's options for a train step: on CPUs less compiling; on one, Eigen's convolutions."""
    if platform() != "cpu":
        return {}
    return {"xla_backend_optimization_level": 1, **forward_options()}


def donated(*arguments: int) -> tuple[int, ...]:
    """Those arguments of a program whose memory its outputs may take.

    None on CPUs: XLA copies there what it may overwrite and has yet to read, which costs more time
    than new memory does.
    """
    return () if platform() == "cpu" else arguments


def _eigen_is_sound() -> bool:
    """Whether a program is made for one device alone.

    Where several CPU devices of a process draw at once, a sampler with Eigen's convolutions left
    noise in the first pictures of each (jaxlib 0.10.2, the shapes world's SR stage, 16 pictures a
    device); on one device its pictures are those of YNNPACK's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.local_device_count() if mesh.empty else mesh.size) == 1


def platform() -> str:
    """What a program is made for: the devices of the mesh in force, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def make_mesh(config: MeshConfig, over: Sequence[jax.Device] = ()) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh over all devices.

    Args:
      config: sizes of its axes.
      over: the devices; (): all that JAX sees.

    Raises:
      ConfigError: the axis sizes do not multiply to the number of devices.
    """
    over = over or jax.devices()
    devices = len(over)
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes[0] == -1:
        rest = sizes[1] * sizes[2]
        if devices % rest:
            fits = [n for n in range(1, devices + 1) if devices % (n * sizes[2]) == 0] or [1]
            nearest = min(fits, key=lambda n: abs(n - sizes[1]))
            raise ConfigError(
                f"config.mesh.fsdp*config.mesh.tensor={sizes[1]}*{sizes[2]} must divide the number "
                f"of devices, {devices}; try config.mesh.fsdp={nearest}"
                + ("" if devices % sizes[2] == 0 else " config.mesh.tensor=1")
            )
        sizes[0] = devices // rest
    if int(np.prod(sizes)) != devices:
        raise ConfigError(
            f"config.mesh data*fsdp*tensor={sizes[0]}*{sizes[1]}*{sizes[2]} must be the number of "
            f"devices, {devices}; leave config.mesh.data=-1 to fill up"
        )
    # jax.make_mesh refuses, on v4 and v5p, an axis that is not a product of the slice's own sides.
    grid = mesh_utils.create_device_mesh(sizes, over, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_devices(mesh: AnyMesh) -> int:
    """Devices over which the first axis of a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: AnyMesh, accumulation: int = 1) -> None:
    """Raises ConfigError when a batch does not divide over the devices and the parts in turn."""
    parts = batch_devices(mesh) * accumulation
    if batch_size % parts:
        nearest = max(round(batch_size / parts), 1) * parts
        in_turn = f" * config.train.accumulation={accumulation}" if accumulation > 1 else ""
        raise ConfigError(
            f"config.data.batch_size={batch_size} must be a multiple of {parts} "
            f"(data*fsdp devices{in_turn}); try {nearest}"
        )


def check_tensor(model: ModelConfig, mesh: AnyMesh) -> None:
    """Raises ConfigError when the tensor axis does not divide the widths and the heads."""
    tensor = mesh.shape["tensor"]
    attends = [s or c for s, c in zip(model.self_attention, model.cross_attention, strict=True)]
    attends[-1] |= bool(model.middle_attention)
    widths = model.channels
    heads = [w // model.head_dim for w, a in zip(widths, attends, strict=True) if a]
    common = math.gcd(*widths, *heads)
    if common % tensor:
        fits = [n for n in range(1, common + 1) if common % n == 0]
        nearest = min(fits, key=lambda n: (abs(n - tensor), n))
        raise ConfigError(
            f"config.mesh.tensor={tensor} must divide config.model.channels={widths} and their "
            f"heads {tuple(heads)} (config.model.head_dim={model.head_dim}); try {nearest}"
        )


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Arrays whose first axis is the batch: split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def everywhere(mesh: AnyMesh) -> NamedSharding:
    """Arrays of which every device has the whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_mesh() -> Mesh:
    """The devices of this process as one axis, `data`: what draws without the other processes."""
    return Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def spread(arrays: Any) -> Any:
    """Lays arrays over this process's devices along their first axis, where these divide it."""
    mesh = local_mesh()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    divides = all(leaf.shape[0] % mesh.size == 0 for leaf in jax.tree.leaves(arrays))
    return jax.device_put(arrays, sharding) if divides else arrays


def replicate(params: Any) -> Any:
    """Copies parameters onto each of this process's devices."""
    return jax.device_put(params, everywhere(local_mesh()))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts one host's part of a batch onto its devices as global arrays."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this host; where it lies on several, all of them must ask."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """The rules applied to the axes of one array; an axis that does not divide stays whole."""

    def split(name: str | None, length: int) -> str | tuple[str, ...] | None:
        axes = RULES[name] if name else None
        parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        return axes if length % parts == 0 else None

    return PartitionSpec(*(split(n, length) for n, length in zip(names, shape, strict=True)))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Tells the compiler how an activation lies, by the logical names of its axes.

    With no mesh in force (`jax.set_mesh`) it says nothing: a network can be run by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh)))


def param_shardings(boxed: Any, mesh: AnyMesh) -> Any:
    """Shardings of (abstract) parameters that carry their logical axis names."""

    def sharding(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def slot_sharding(
    slot: Sequence[int], param: Sequence[int], sharding: NamedSharding
) -> NamedSharding:
    """How an optimizer's slot lies, given how its parameter does.

    A slot of the parameter's shape lies as it does. A factored slot (Adafactor) is the parameter
    summed over one axis: it is split along the axes that are left. Anything else is whole.
    """
    axes = (*sharding.spec, *(None,) * (len(param) - len(sharding.spec)))
    if tuple(slot) == tuple(param):
        return sharding
    for gone in range(len(param)):
        if tuple(slot) == (*param[:gone], *param[gone + 1 :]):
            return NamedSharding(sharding.mesh, PartitionSpec(*axes[:gone], *axes[gone + 1 :]))
    return everywhere(sharding.mesh)


def unbox(params: Any) -> Any:
    """The plain arrays of parameters that carry their logical axis names."""
    return nn.meta.unbox(params)
