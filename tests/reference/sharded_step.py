"""One training step on several meshes of eight virtual CPU devices, against the same step on one.

Run as a program, because the number of devices is fixed when JAX starts. Prints a JSON object.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from imagen_jax import config_io, partitioning, train, train_state, train_step
from imagen_jax.config import Config, MeshConfig
from imagen_jax.optimizer import make_optimizer

MESHES = {
    "data8": MeshConfig(data=8),
    "data2_fsdp4": MeshConfig(data=2, fsdp=4),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def make_batch(config: Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n, size = config.data.batch_size, config.data.image_size
    shape = (n, config.data.max_text_len, config.model.text_dim)
    return {
        "image": rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32),
        "text_emb": rng.normal(size=shape).astype(np.float32),
        "text_mask": np.arange(shape[1]) <= (np.arange(n) % shape[1])[:, None],
    }


def step_on(mesh_config: MeshConfig, config: Config, state, batch):
    """State and report after one step on a mesh; also the largest share of a leaf per device."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    mesh = partitioning.make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        _, abstract = train.abstract_state(config, optimizer, mesh)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
        step = jax.jit(train_step.make_train_step(config, optimizer))
        state, report = step(placed, partitioning.place_batch(batch, mesh))
        kernel = state.params["down_0_0"]["conv_in"]["kernel"]
        dense = state.params["cond"]["noise"]["out"]["kernel"]
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == dense.shape]
        shards = {
            name: leaf.addressable_shards[0].data.shape
            for name, leaf in {
                "conv": kernel,
                "dense": dense,
                "ema": state.ema["ema"]["down_0_0"]["conv_in"]["kernel"],
                "moment": moments[0],
            }.items()
        }
    return jax.device_get((state, report)), shards


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    config = config_io.from_json(sys.argv[1])
    data = dataclasses.replace(config.data, batch_size=8)
    # A large epsilon: Adam's update is then a smooth function of the gradient, and not the sign of
    # what may be rounding noise.
    optimizer_config = dataclasses.replace(config.optimizer, eps=1e-2)
    config = dataclasses.replace(config, data=data, optimizer=optimizer_config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    batch = make_batch(config)
    shapes = jax.eval_shape(
        lambda: partitioning.unbox(train.stage.init_params(config, jax.random.key(0)))
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes
    )
    start = jax.device_get(train_state.create(params, optimizer))
    plain = jax.jit(train_step.make_train_step(config, optimizer))
    expected_state, expected_report = jax.device_get(plain(start, batch))

    results = {}
    for name, mesh in MESHES.items():
        (state, report), shards = step_on(mesh, config, start, batch)
        moved = jax.tree.map(lambda a, b: a - b, state.params, start.params)
        expected = jax.tree.map(lambda a, b: a - b, expected_state.params, start.params)
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), moved, expected)
        results[name] = {
            "loss": float(report["loss"] / expected_report["loss"]) - 1.0,
            "grad_norm": float(report["grad_norm"] / expected_report["grad_norm"]) - 1.0,
            "update_scale": scale,
            "update_error": max(jax.tree.leaves(error)) / scale,
            "shards": shards,
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
