"""One training step on several meshes of eight virtual CPU devices, against one device.

A separate program, because the number of devices is fixed when JAX starts. Arguments: CONFIG_JSON
adam|adafactor. Prints a JSON object.
"""

import contextlib
import dataclasses
import functools
import json
import re
import sys

import jax
import numpy as np
import optax

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config, MeshConfig
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import MODELS, init_params
from imagen_jax.training import initial_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.state import create_state
from imagen_jax.training.step import make_train_step

MESHES = {
    "data2_fsdp4": MeshConfig(data=2, fsdp=4),
    "data4_tensor2": MeshConfig(data=4, tensor=2),
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


def parameter_shapes(config: Config):
    return jax.eval_shape(lambda: partitioning.unbox(init_params(config, jax.random.key(0))))


def step_on(mesh_config: MeshConfig, config: Config, state, batch):
    """State and report after one step on a mesh, and the shapes per device of some leaves."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    mesh = partitioning.make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        _, abstract = initial_state.abstract_state(config, optimizer, mesh)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
        step = jax.jit(make_train_step(config, optimizer))
        state, report = step(placed, partitioning.place_batch(batch, mesh))
        kernel = state.params["down_0_0"]["conv_in"]["kernel"]
        where = ("cond", "noise", "out", "kernel")
        leaves = {
            "conv": kernel,
            "dense": leaf_at(state.params, where),
            "ema": state.ema["ema"]["down_0_0"]["conv_in"]["kernel"],
        } | slots(state.opt_state, where)
        shards = {name: leaf.addressable_shards[0].data.shape for name, leaf in leaves.items()}
    return jax.device_get((state, report)), shards


def leaf_at(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)


def slots(opt_state, path) -> dict[str, jax.Array]:
    """The optimizer's slots of one parameter."""
    names = ("mu", "v_row", "v_col")
    return {name: leaf_at(tree, path) for name in names for tree in found(opt_state, name)}


def found(opt_state, name) -> list:
    return [tree for _, tree in optax.tree.get_all_with_path(opt_state, name)]


def attention_shapes(config: Config, params, constrained: bool) -> list[list[int]]:
    """Shapes per device of the attention weights for replicated parameters and inputs."""
    mesh = partitioning.make_mesh(MESHES["data2_fsdp2_tensor2"])
    batch = make_batch(config)
    network = MODELS[config.model.name](config.model)
    pixels, text = config.data.image_size**2, config.data.max_text_len
    with jax.set_mesh(mesh), unconstrained(not constrained):
        arguments = batch["image"], np.zeros(8, np.float32), batch["text_emb"], batch["text_mask"]
        placed = jax.device_put((params, arguments), partitioning.replicated(mesh))
        forward = jax.jit(lambda params, arguments: network.apply({"params": params}, *arguments))
        program = forward.lower(*placed).compile().as_text()
    shapes = re.findall(rf"f32\[(\d+),(\d+),{pixels},{pixels + text}\]", program)
    return sorted([int(b), int(h)] for b, h in set(shapes))


@contextlib.contextmanager
def unconstrained(active: bool):
    """Disables `partitioning.constrain` if active."""
    constrain = partitioning.constrain
    if active:
        partitioning.constrain = lambda x, names: x
    try:
        yield
    finally:
        partitioning.constrain = constrain


def shifted(tree, start):
    return jax.tree.map(lambda a, b: a - b, tree, start)


def worst(got, expected) -> float:
    """Largest difference of two trees, relative to the largest expected value."""
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got, expected)
    return max(jax.tree.leaves(error)) / scale


def compare(config: Config, meshes, smallest: int = 1) -> dict:
    """Compares a step on one device with the same step on each mesh.

    Compares the updates of all parameters, or of those whose last two axes are at least `smallest`.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    batch = make_batch(config)
    shapes = jax.eval_shape(lambda: partitioning.unbox(init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes
    )
    start = jax.device_get(create_state(params, optimizer))
    plain = jax.jit(make_train_step(config, optimizer))
    expected, expected_report = jax.device_get(plain(start, batch))

    def update(state):
        leaves = jax.tree.leaves(shifted(state.params, start.params))
        wide = lambda x: x.ndim > 1 and min(x.shape[-2:]) >= smallest  # noqa: E731
        return [leaf for leaf in leaves if smallest == 1 or wide(leaf)]

    expected_update = update(expected)

    results = {}
    for name in meshes:
        (state, report), shards = step_on(MESHES[name], config, start, batch)
        results[name] = {
            "loss": float(report["loss"] / expected_report["loss"]) - 1.0,
            "grad_norm": float(report["grad_norm"] / expected_report["grad_norm"]) - 1.0,
            "update_scale": max(float(np.abs(u).max()) for u in expected_update),
            "update_error": worst(update(state), expected_update),
            "shards": shards,
        }
        # After one step Adam's first moment is a tenth of the gradient.
        for got, target in zip(
            found(state.opt_state, "mu"), found(expected.opt_state, "mu"), strict=True
        ):
            results[name]["gradient_error"] = worst(got, target)
    return results


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    config = overrides.from_json(sys.argv[1])
    data = dataclasses.replace(config.data, batch_size=8)
    # With a large epsilon Adam's update is a smooth function of the gradient; with a small one it
    # is the sign of a gradient that may be rounding noise.
    adam = dataclasses.replace(config.optimizer, eps=1e-2, clip_norm=0.0)
    model = dataclasses.replace(config.model, head_dim=2)  # Four heads, two for a tensor device.
    config = dataclasses.replace(config, data=data, optimizer=adam, model=model)
    results = adam_on_all(config) if sys.argv[2] == "adam" else adafactor(config)
    print(json.dumps(results))


def adam_on_all(config: Config) -> dict:
    results = compare(config, MESHES)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), parameter_shapes(config))
    for name, constrained in (("constrained", True), ("unconstrained", False)):
        results[name] = attention_shapes(config, params, constrained)
    return results


def adafactor(config: Config) -> dict:
    """Compares a step of Adafactor, whose slots are factored from size 128 on.

    Its epsilon is tiny, so the update of a parameter whose gradient is rounding noise (a bias
    before a norm) is noise too. Only updates of factored parameters are compared.
    """
    model = dataclasses.replace(config.model, embed_dim=128)
    optimizer = dataclasses.replace(config.optimizer, name="adafactor")
    return compare(
        dataclasses.replace(config, optimizer=optimizer, model=model),
        ["data2_fsdp2_tensor2"],
        smallest=128,
    )


if __name__ == "__main__":
    main()
