"""The paper's models at full size, by shapes alone: counts, shardings, whole images."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.network import init_params
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.state import create_state, state_shardings

FILE = pathlib.Path(__file__).parents[2] / "configs" / "imagen.py"
COUNTS = {
    "base_64": 2_407_520_259,
    "base_64_1b": 1_012_510_467,
    "base_64_500m": 536_493_699,
    "base_64_300m": 301_181_827,
    "sr_256": 483_821_699,
    "sr_1024": 479_623_299,
}
STAGES = ["base_64", "sr_256", "sr_1024"]


@functools.cache
def load(name: str) -> Config:
    return overrides.load(f"{FILE}:{name}")


@functools.cache
def boxed_params(name: str):
    return jax.eval_shape(lambda: init_params(load(name), jax.random.key(0)))


@pytest.mark.parametrize(
    "name", [n if n in STAGES else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS]
)
def test_number_of_parameters(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed_params(name))) == COUNTS[name]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("mesh_shape", [(1, 128, 1), (2, 8, 8)], ids=str)
def test_every_large_array_is_sharded_under_fsdp(name, mesh_shape):
    """Parameters, averages and optimizer slots of more than a megabyte, at full size."""
    config = load(name)
    mesh = AbstractMesh(mesh_shape, partitioning.AXES, (AxisType.Auto,) * 3)
    partitioning.check_tensor(config.model, mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    boxed = boxed_params(name)
    abstract = jax.eval_shape(
        lambda params: create_state(params, optimizer), partitioning.unbox(boxed)
    )
    shardings = state_shardings(abstract, boxed, optimizer, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    # Adafactor keeps less than a twentieth of what Adam does.
    slots = sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state)) / COUNTS[name]
    assert slots < 0.05 if config.optimizer.name == "adafactor" else 2.0 <= slots < 2.001
    whole = [
        jax.tree_util.keystr(path)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        if leaf.size * 4 > 1e6
        and np.prod(sharding.shard_shape(leaf.shape)) * mesh_shape[1] > leaf.size
    ]
    assert whole == []


def test_the_third_stage_trains_on_crops_and_samples_whole_images():
    """No parameter depends on the image size: the same ones upsample 256 -> 1024."""
    config = load("sr_1024")
    assert not any(config.model.self_attention)
    data = config.data.uncropped()
    assert (config.data.image_size, config.data.lowres_size) == (256, 64)
    assert (data.image_size, data.lowres_size) == (1024, 256)
    whole = dataclasses.replace(config, data=data)
    params = partitioning.unbox(boxed_params("sr_1024"))
    drawn = jax.eval_shape(
        lambda params: sample_stage(
            params,
            whole,
            Text(jnp.zeros((1, 8, 4096)), jnp.ones((1, 8), bool)),
            image_keys(0, [0], [0]),
            jnp.zeros((1, 256, 256, 3)),
        ),
        params,
    )
    assert drawn.shape == (1, 1024, 1024, 3)
