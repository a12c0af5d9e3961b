"""Restores of a tiny state in several processes, with faults in one of them.

    python tests/reference/restore_probe.py WORKDIR OUT

Runs in every process of a launch (tests/reference/processes.py). Process I writes OUT.I.json: per
scenario the step that it restored, whether the state equals the saved one bit for bit, the lines
and errors it got, and the files that tensorstore opened while it restored.
"""

import errno
import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.config.schema import CheckpointConfig, Config, MeshConfig
from imagen_jax.parallel import distributed, partitioning, replicas
from imagen_jax.training import restore
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.state import TrainState

SPECS = {
    "kernel": PartitionSpec(None, "fsdp"),
    "bias": PartitionSpec("tensor"),
    "scale": PartitionSpec(),
}
STEPS = (2, 4, 6)


def values(step: int) -> dict[str, np.ndarray]:
    """Parameters with values that a sum of floats would change: -0.0, NaN, subnormals."""
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(6, 8)).astype(np.float32)
    kernel[0, :4] = [-0.0, np.nan, 1e-40, np.inf]
    return {"kernel": kernel, "bias": np.full(4, -0.0, np.float32), "scale": rng.normal(size=3)}


def make_state(step: int, mesh) -> TrainState:
    def place(spec, array):
        sharding = NamedSharding(mesh, spec)
        array = np.asarray(array, np.float32 if array.dtype.kind == "f" else array.dtype)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    params = {name: place(SPECS[name], array) for name, array in values(step).items()}
    scalar = lambda value: place(PartitionSpec(), np.asarray(value, np.int32))  # noqa: E731
    averages = {"ema": jax.tree.map(jnp.copy, params)}
    return TrainState(scalar(step), params, averages, {"count": scalar(step)}, scalar(0))


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(state, other) -> bool:
    """Equal bit for bit on the devices of this process."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(
        x.sharding == y.sharding and np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        for x, y in pairs
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )


def opened() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/open_read")
    return sum(int(value["value"]) for metric in metrics for value in metric["values"])


def restore_newest(checkpoints: Checkpoints, mesh) -> dict:
    lines, before = [], opened()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            newest = checkpoints.restore_newest(
                abstract_of(make_state(0, mesh)), lambda config: None, lines.append
            )
            assert newest
            step, state = newest
            found = {"step": step, "same": same(state, make_state(step, mesh))}
        except restore.CheckpointError as error:
            found = {"error": type(error).__name__, "text": str(error)}
    retried = [str(w.message) for w in warned if "trying again" in str(w.message)]
    return {**found, "lines": lines, "retried": retried, "opened": opened() - before}


def failing(error: Exception, process: int, times: int):
    """A context in which reads fail `times` times in one process."""
    original = ocp.PyTreeCheckpointHandler.restore
    left = [times if distributed.index() == process else 0]

    def fail(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return original(self, *args, **kwargs)

    return fail, original


SCENARIOS = {
    "whole": (None, 0, 0),
    "one error": (OSError(errno.EIO, "Input/output error"), 1, 1),
    "one machine": (OSError(errno.EIO, "Input/output error"), 1, 99),
    "one machine, damaged": (ValueError("zarr: invalid metadata"), 1, 99),
    "memory": (MemoryError("RESOURCE_EXHAUSTED: out of memory allocating 9 bytes"), 1, 99),
}


def main(workdir: str, out: str) -> None:
    distributed.initialize(lambda line: None)
    restore.BACK_OFF = 0.01
    results = {}
    # fsdp over both processes: each has to read its half.
    mesh = partitioning.make_mesh(MeshConfig(fsdp=jax.device_count()))
    checkpoints = Checkpoints(workdir, CheckpointConfig(), access="write")
    for step in STEPS:
        checkpoints.save(step, make_state(step, mesh), Config())
    checkpoints.wait()
    with jax.set_mesh(mesh):
        for name, (error, process, times) in SCENARIOS.items():
            fail, original = failing(error, process, times) if error else (None, None)
            if fail:
                setattr(ocp.PyTreeCheckpointHandler, "restore", fail)  # noqa: B010
            results[name] = restore_newest(checkpoints, mesh)
            if fail:
                setattr(ocp.PyTreeCheckpointHandler, "restore", original)  # noqa: B010
    average = checkpoints.restore_ema(4, abstract_of(make_state(4, mesh)).params)
    results["average"] = same(average, make_state(4, mesh).params)
    # Pure data parallelism: every process could read all, one does.
    mesh = partitioning.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        results["replicas"] = restore_newest(checkpoints, mesh)
        make_mesh, replicas.replica_mesh = replicas.replica_mesh, whole_mesh
        results["each reads"] = restore_newest(checkpoints, mesh)
        replicas.replica_mesh = make_mesh
    distributed.share("before the damage")
    newest = checkpoints.path / str(STEPS[-1]) / "state"
    if distributed.is_first():
        for path in pathlib.Path(newest).rglob("*"):
            if path.is_file() and path.parent.name == "d":  # Data, not metadata.
                path.write_bytes(b"\0\xff" * 50)
    distributed.share("after the damage")
    with jax.set_mesh(mesh):
        results["damaged"] = restore_newest(checkpoints, mesh)
    results["folders"] = sorted(path.name for path in checkpoints.path.iterdir())
    checkpoints.close()
    with open(f"{out}.{distributed.index()}.json", "w") as file:
        json.dump(results, file)


def whole_mesh(mesh):
    return jax.sharding.Mesh(mesh.devices[None], ("replica", *mesh.axis_names))


if __name__ == "__main__":
    main(*sys.argv[1:])
