"""The device mesh and the sharding of arrays: logical axis names -> mesh axes (`RULES`).

The mesh has the axes data (batch only), fsdp (batch and parameters) and tensor (channels, heads).
Layers name the logical axes of their parameters and of some activations. A new layer needs a row in
`RULES` only if it has a new logical axis.
"""

from __future__ import annotations

import functools
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

# Shardings can be computed without devices.
AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis or axes; None: replicated.
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
    "height": "height",  # of `sampling_mesh` alone
}


# XLA options for programs that run once: minimal optimisation, short compile time.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 0}

# On CPUs XLA uses the library YNNPACK for convolutions, products and reductions. Eigen's
# convolutions are faster (docs/performance.md), so YNNPACK gets products and reductions only.
_LIBRARY = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


def forward_options() -> dict[str, Any]:
    """XLA options for inference: Eigen's convolutions on a single CPU device."""
    return dict(_LIBRARY) if platform() == "cpu" and _eigen_is_sound() else {}


def train_step_options() -> dict[str, Any]:
    """XLA options for a train step: on CPUs optimisation level 1 and `forward_options`."""
    if platform() != "cpu":
        return {}
    return {"xla_backend_optimization_level": 1, **forward_options()}


def donated(*arguments: int) -> tuple[int, ...]:
    """Arguments of a program to donate: `arguments`, or none on CPUs.

    On CPUs XLA copies donated buffers that it has yet to read, which takes longer than allocating.
    """
    return () if platform() == "cpu" else arguments


def _eigen_is_sound() -> bool:
    """Whether a program runs on one device.

    With several CPU devices in a process, a sampler with Eigen's convolutions left noise in the
    first images of each device (jaxlib 0.10.2, SR stage of configs/shapes.py, 16 images per
    device). On one device its images equal those of YNNPACK.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.local_device_count() if mesh.empty else mesh.size) == 1


def platform() -> str:
    """Platform of the active mesh (`jax.set_mesh`), otherwise JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] = ()) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh of all devices, over one or several slices.

    Within a slice, devices are connected by its own network (ICI); slices by the data-centre
    network (DCN). JAX numbers them: TPU slices; on GPUs the machines, or NVLink domains of several.
    The axes data and fsdp have `dcn_data` and `dcn_fsdp` slices along them, each with `data` and
    `fsdp` devices; an axis enumerates slice by slice.

    Args:
      config: sizes of the axes.
      devices: the devices; (): all that JAX has.

    Raises:
      ConfigError: the products of the axis sizes are not the numbers of devices and slices.
    """
    devices = devices or jax.devices()
    slices = _slice_count(devices, "slice_index")
    # CPU processes of one machine stand for slices, so that these can be tried.
    by_process = (
        slices == 1 and devices[0].platform == "cpu" and max(config.dcn_data, config.dcn_fsdp) > 1
    )
    if by_process:
        slices = _slice_count(devices, "process_index")
    ici = _ici_sizes(config, len(devices) // slices)
    dcn = _dcn_sizes(config, slices)
    # On v4 and v5p, jax.make_mesh rejects axes that are not products of sides of the slice.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(ici, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, process_is_granule=by_process, **split
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def sampling_mesh(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
    *,
    fsdp: int,
    height: int,
) -> Mesh:
    """A mesh to sample with: AXES and `height`, which shards the rows of images.

    Args:
      devices: in the order of the batch.
      fsdp: devices that share one copy of the parameters.
      height: devices that share one image.

    Raises:
      ConfigError: fsdp * height does not divide the number of devices.
    """
    if len(devices) % (fsdp * height):
        fits = [n for n in range(1, len(devices) + 1) if len(devices) % (n * height) == 0] or [1]
        nearest = min(fits, key=lambda n: abs(n - fsdp))
        raise ConfigError(
            f"config.sampling.fsdp*height={fsdp}*{height} must divide the number of devices, "
            f"{len(devices)}; try fsdp={nearest}"
            + ("" if len(devices) % height == 0 else " height=1")
        )
    sizes = (len(devices) // (fsdp * height), fsdp, 1, height)
    return Mesh(
        np.asarray(devices).reshape(sizes), (*AXES, "height"), axis_types=(AxisType.Auto,) * 4
    )


def _slice_count(devices: Sequence[jax.Device], number: str) -> int:  # pyright: ignore[reportInvalidTypeForm]
    return len({getattr(device, number, 0) for device in devices})


def _dcn_sizes(config: MeshConfig, slices: int) -> list[int]:
    """Slices along data, fsdp and tensor. Raises ConfigError."""
    data, fsdp = config.dcn_data, config.dcn_fsdp
    if data == -1 and slices % fsdp == 0:
        data = slices // fsdp
    if data * fsdp != slices or data < 1:
        raise ConfigError(
            f"config.mesh.dcn_data*dcn_fsdp={data}*{fsdp} must be the number of slices, {slices}; "
            "set config.mesh.dcn_data=-1 config.mesh.dcn_fsdp=1 to use all of them for data"
        )
    return [data, fsdp, 1]


def _ici_sizes(config: MeshConfig, count: int) -> list[int]:
    """Devices of a slice of `count` along data, fsdp and tensor. Raises ConfigError."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes[0] == -1:
        rest = sizes[1] * sizes[2]
        if count % rest:
            fits = [n for n in range(1, count + 1) if count % (n * sizes[2]) == 0] or [1]
            nearest = min(fits, key=lambda n: abs(n - sizes[1]))
            raise ConfigError(
                f"config.mesh.fsdp*config.mesh.tensor={sizes[1]}*{sizes[2]} must divide the number "
                f"of devices, {count}; try config.mesh.fsdp={nearest}"
                + ("" if count % sizes[2] == 0 else " config.mesh.tensor=1")
            )
        sizes[0] = count // rest
    if int(np.prod(sizes)) != count:
        raise ConfigError(
            f"config.mesh data*fsdp*tensor={sizes[0]}*{sizes[1]}*{sizes[2]} must be the number of "
            f"devices, {count}; set config.mesh.data=-1 to use all of them"
        )
    return sizes


def batch_devices(mesh: AnyMesh) -> int:
    """Number of devices over which the first axis of a batch is sharded."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: AnyMesh, accumulation: int = 1) -> None:
    """Raises ConfigError unless batch_size is a multiple of devices times accumulation."""
    parts = batch_devices(mesh) * accumulation
    if batch_size % parts:
        nearest = max(round(batch_size / parts), 1) * parts
        factor = f" * config.train.accumulation={accumulation}" if accumulation > 1 else ""
        raise ConfigError(
            f"config.data.batch_size={batch_size} must be a multiple of {parts} "
            f"(data*fsdp devices{factor}); try {nearest}"
        )


def check_tensor(model: ModelConfig, mesh: AnyMesh) -> None:
    """Raises ConfigError unless the tensor axis divides the widths and the numbers of heads."""
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
    """Sharding of a batch: the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_mesh() -> Mesh:
    """The devices of this process as one axis `data`, to sample without other processes."""
    return Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(arrays: Any) -> Any:
    """Shards arrays over the devices of this process along the first axis, if these divide it."""
    mesh = local_mesh()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    divides = all(leaf.shape[0] % mesh.size == 0 for leaf in jax.tree.leaves(arrays))
    return jax.device_put(arrays, sharding) if divides else arrays


def replicate(params: Any) -> Any:
    """Copies parameters to every device of this process."""
    return jax.device_put(params, replicated(local_mesh()))


@functools.lru_cache(maxsize=16)
def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that the devices of this process hold, ascending.

    They follow from the sharding, so they are right for any device order, and where several
    processes hold the same rows (tensor parallelism over processes).
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    held = np.zeros(batch_size, bool)
    for index in indices:
        held[index] = True
    return np.flatnonzero(held)


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] of the rows that this process has.

    Args:
      batch: arrays whose first axis is `batch_rows(mesh, batch_size)`, or the whole batch.
      mesh: from `make_mesh`.
      batch_size: rows of the global batch; None: `batch` is the whole one.

    Raises:
      ConfigError: another number of rows.
    """
    batch_size = batch_size or len(next(iter(batch.values())))
    rows, sharding = batch_rows(mesh, batch_size), batch_sharding(mesh)

    def place(name: str, values: np.ndarray) -> jax.Array:
        if len(values) not in (len(rows), batch_size):
            raise ConfigError(
                f"batch[{name!r}] has {len(values)} rows; give the {len(rows)} rows of "
                f"partitioning.batch_rows, or all {batch_size} of config.data.batch_size"
            )
        first = np.arange(batch_size) if len(values) == batch_size else rows

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            at = int(np.searchsorted(first, start))
            return values[at : at + stop - start]

        shape = (batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, read)

    return {name: place(name, values) for name, values in batch.items()}


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this host; with several processes, all of them must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """`RULES` applied to the axes of one array.

    An axis that is not divisible is not sharded, nor one whose mesh axis does not exist.
    """

    def split(name: str | None, length: int) -> str | tuple[str, ...] | None:
        axes = RULES[name] if name else None
        parts = (axes,) if isinstance(axes, str) else axes or ()
        known = all(part in mesh.shape for part in parts)
        return axes if known and length % math.prod(mesh.shape[a] for a in parts) == 0 else None

    return PartitionSpec(*(split(n, length) for n, length in zip(names, shape, strict=True)))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Sharding constraint of an activation from its logical axis names.

    Without an active mesh (`jax.set_mesh`) it returns x unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh)))


def shard_height(x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] sharded by rows where the active mesh is a `sampling_mesh`."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return constrain(x, ("batch", "height", None, None)) if "height" in names else x


def param_shardings(boxed: Any, mesh: AnyMesh) -> Any:
    """Shardings of (abstract) parameters boxed with their logical axis names."""

    def sharding(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def slot_sharding(
    slot: Sequence[int], param: Sequence[int], sharding: NamedSharding
) -> NamedSharding:
    """Sharding of an optimizer slot from that of its parameter.

    A slot of the parameter's shape has the parameter's sharding. A factored slot (Adafactor) is the
    parameter summed over one axis; it is sharded along the remaining axes. Others are replicated.

    Args:
      slot: shape of the slot.
      param: shape of the parameter.
      sharding: sharding of the parameter.
    """
    axes = (*sharding.spec, *(None,) * (len(param) - len(sharding.spec)))
    if tuple(slot) == tuple(param):
        return sharding
    for axis in range(len(param)):
        if tuple(slot) == (*param[:axis], *param[axis + 1 :]):
            return NamedSharding(sharding.mesh, PartitionSpec(*axes[:axis], *axes[axis + 1 :]))
    return replicated(sharding.mesh)


def unbox(params: Any) -> Any:
    """Plain arrays of parameters boxed with their logical axis names."""
    return nn.meta.unbox(params)


def factor_names(boxed: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Logical axis names of the two factors of a low-rank update of a boxed kernel."""
    names = boxed.names if isinstance(boxed, nn.Partitioned) else (None,) * boxed.ndim
    return (*names[:-1], None), (None, names[-1])


def box(value: Any, names: tuple[Any, ...]) -> Any:
    """An array boxed with its logical axis names, for `param_shardings`."""
    return nn.LogicallyPartitioned(value, names)
