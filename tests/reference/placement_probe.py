"""What every device trains on: a table of the rows of a few steps, or a real run, on a given mesh.

    python tests/reference/placement_probe.py table CONFIG ORDER,... OUT [--config.a.b=value ...]
    python tests/reference/placement_probe.py train CONFIG ORDER,... OUT [--config.a.b=value ...]

An ORDER permutes the devices of the mesh: straight, reversed, or v6e (processes in the order of a
4x4 slice of v6e, scaled down); results go to OUT.ORDER. `table` uses every loader that is installed
and replaces the network by a probe: per device and row of the global batch it writes what reached
it: record, timestep, caption-drop bit, and hashes of the noise and of the text. The images of the
data set hold their record number in their pixels (tests/parallel/test_placement.py). `train` writes
losses and final parameters.
"""

import dataclasses
import importlib.util
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.cli import wiring
from imagen_jax.config import overrides
from imagen_jax.data.batches import loaders
from imagen_jax.parallel import distributed, partitioning
from imagen_jax.stages import loss
from imagen_jax.training import step as step_lib
from imagen_jax.training import train as train_lib

STEPS = (0, 1, 5)
# Process of each device along the batch axes of a v6e 4x4 slice with data=16.
V6E = (0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 3, 3, 3, 3, 2, 2)


def permuted(devices, order: str):
    """Devices in another order; v6e interleaves the processes as that slice does."""
    devices = list(devices)
    if order == "straight":
        return devices
    if order == "reversed":
        return devices[::-1]
    assert order == "v6e"
    groups = len(V6E) // len(devices)
    by_process: dict[int, list] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if len(by_process) == 1:  # One process: its devices as if each pair were a process.
        by_process = {i: devices[2 * i : 2 * i + 2] for i in range(len(devices) // 2)}
    found = []
    for process in V6E[::groups] if groups > 1 else V6E:
        available = by_process.get(process % len(by_process), [])
        if available:
            found.append(available.pop(0))
    return found + [device for rest in by_process.values() for device in rest]


def hash_rows(values: jax.Array) -> jax.Array:
    """A hash of each row's bits, exact on any device: sums of uint32 wrap around."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    bits = bits.reshape(len(values), -1)
    weights = jnp.arange(bits.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return (bits * weights).sum(axis=1, dtype=jnp.uint32)


def probe_step(config):
    """A jitted function (batch, step) -> what the network and the loss see, per row."""

    def run(batch, step):
        seen = {}

        def record(params, config, z, logsnr, conditioning, *, dropout_key=None):
            seen.update(logsnr=logsnr, z=z, text=conditioning.text.emb, mask=conditioning.text.mask)
            return jnp.zeros_like(z)

        original, loss.apply = loss.apply, record
        try:
            key = step_lib.step_key(config, step)
            randomness = loss.sample_randomness(key, len(batch["image"]), config)
            loss.loss_given_randomness({}, {**batch, **randomness}, key, config)
        finally:
            loss.apply = original
        levels = jnp.round((batch["image"][:, 0, 0] + 1.0) * 127.5).astype(jnp.int32)
        return {
            "record": levels[:, 0] + 256 * levels[:, 1],
            "time": randomness["time"],
            "drop": ~jnp.any(seen["text"] != 0, axis=(1, 2)),
            "noise": hash_rows(randomness["eps"]),
            "z": hash_rows(seen["z"]),
            "text": hash_rows(batch["text_emb"]),
        }

    return jax.jit(run)


def table(config, mesh, pipeline) -> list[dict]:
    rows = []
    run = probe_step(config)
    with jax.set_mesh(mesh):
        for step in STEPS:
            batch = next(iter(loaders.batches(pipeline, step)))
            placed = partitioning.place_batch(batch, mesh, config.data.batch_size)
            assert all(len(v) == config.data.batch_size for v in placed.values())
            outputs = jax.tree.map(
                lambda v: jax.lax.with_sharding_constraint(v, partitioning.batch_sharding(mesh)),
                run(placed, step),
            )
            by_device: dict[tuple, dict] = {}
            for name, value in outputs.items():
                for shard in value.addressable_shards:
                    start = shard.index[0].start or 0
                    for offset, item in enumerate(np.asarray(shard.data).tolist()):
                        at = (step, start + offset, shard.device.id)
                        by_device.setdefault(at, {})[name] = item
            for (number, row, device), values in by_device.items():
                rows.append({"step": number, "row": row, "device": device, **values})
    return rows


def train(config, pipeline, workdir: str) -> dict:
    state = train_lib.train(
        config,
        workdir,
        lambda start: loaders.batches(pipeline, start),
        lambda line: None,
        encode=pipeline.encode,
    )
    flat = jax.tree_util.tree_leaves_with_path(state.params)
    return {jax.tree_util.keystr(path): partitioning.fetch(leaf) for path, leaf in flat}


def main(what: str, spec: str, orders: str, out: str, *flags: str) -> None:
    distributed.initialize(lambda line: None)
    make_mesh = partitioning.make_mesh
    for order in orders.split(","):

        def permuted_mesh(mesh, devices=(), order=order):
            return make_mesh(mesh, permuted(devices or jax.devices(), order))

        partitioning.make_mesh = permuted_mesh
        config = overrides.load(spec, [flag.removeprefix("--config.") for flag in flags])
        if what == "table":
            write_tables(config, f"{out}.{order}")
        else:
            write_run(config, f"{out}.{order}")


def write_tables(config, out: str) -> None:
    mesh = partitioning.make_mesh(config.mesh)
    for loader in ("numpy", "seqio"):
        if importlib.util.find_spec("tensorflow") is None and loader == "seqio":
            continue
        data = dataclasses.replace(config.data, loader=loader)
        pipeline = wiring.open_pipeline(dataclasses.replace(config, data=data))
        with open(f"{out}.{loader}.{jax.process_index()}.json", "w") as file:
            json.dump(table(config, mesh, pipeline), file)


def write_run(config, out: str) -> None:
    pipeline = wiring.open_pipeline(config)
    config = train_lib.with_data(
        config, pipeline.store.dim, pipeline.store.fingerprint, pipeline.fingerprint()
    )
    params = train(config, pipeline, out + ".run")
    if distributed.is_first():
        np.savez(out + ".npz", **params)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
