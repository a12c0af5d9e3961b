"""Meshes: what does not fit is refused; a step is the same however it is split."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from imagen_jax import config as config_lib
from imagen_jax import config_io, partitioning, stage
from imagen_jax.config import ConfigError, MeshConfig

ROOT = pathlib.Path(__file__).parents[1]


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), partitioning.AXES, (AxisType.Auto,) * 3)


def test_a_batch_that_does_not_divide():
    partitioning.check_batch_size(96, mesh_of(2, 4, 2))
    with pytest.raises(ConfigError) as error:
        partitioning.check_batch_size(100, mesh_of(2, 4, 2))
    assert str(error.value) == (
        "config.data.batch_size=100 must be a multiple of 8 (data*fsdp devices); try 96"
    )
    with pytest.raises(ConfigError, match="try 8"):
        partitioning.check_batch_size(1, mesh_of(2, 4, 2))


def test_a_mesh_that_does_not_fit_the_devices():
    devices = jax.device_count()
    assert partitioning.make_mesh(MeshConfig()).size == devices
    with pytest.raises(ConfigError, match=f"the number of devices, {devices}"):
        partitioning.make_mesh(MeshConfig(fsdp=devices + 1))
    with pytest.raises(ConfigError, match="leave config.mesh.data=-1"):
        partitioning.make_mesh(MeshConfig(data=devices + 1))


def test_every_large_parameter_is_split_at_full_width(base_config):
    """A name that the rules lack, or a layer without names, would leave its kernel whole."""
    model = config_lib.ModelConfig(text_dim=4096)
    data = config_lib.DataConfig(image_size=64)
    config = config_lib.Config(model=model, data=data)
    boxed = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
    shardings = jax.tree.leaves(partitioning.param_shardings(boxed, mesh_of(1, 4, 2)))
    leaves = jax.tree_util.tree_leaves_with_path(partitioning.unbox(boxed))
    assert sum(leaf.size for _, leaf in leaves) > 2e9
    whole = [
        jax.tree_util.keystr(path)
        for (path, leaf), sharding in zip(leaves, shardings, strict=True)
        if leaf.size > 1e5 and np.prod(sharding.shard_shape(leaf.shape)) * 8 != leaf.size
    ]
    assert whole == []


@pytest.fixture(scope="module")
def steps(base_config):
    """What tests/reference/sharded_step.py found."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.reference.sharded_step", config_io.to_json(base_config)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mesh", ["data8", "data2_fsdp4", "data2_fsdp2_tensor2"])
def test_a_split_step_is_the_whole_step(steps, mesh):
    # Only the order of the sums differs: 1e-7 per operation, some hundred of them in a row.
    assert abs(steps[mesh]["loss"]) < 1e-5 and abs(steps[mesh]["grad_norm"]) < 1e-5
    assert steps[mesh]["update_error"] < 1e-4
    assert steps[mesh]["update_scale"] > 1e-5


@pytest.mark.parametrize(
    ("mesh", "conv", "dense"),
    [
        ("data8", [3, 3, 8, 8], [16, 16]),
        ("data2_fsdp4", [3, 3, 2, 8], [4, 16]),
        ("data2_fsdp2_tensor2", [3, 3, 4, 4], [8, 8]),
    ],
)
def test_parameters_averages_and_moments_are_truly_split(steps, mesh, conv, dense):
    assert steps[mesh]["shards"] == {"conv": conv, "ema": conv, "dense": dense, "moment": dense}


def test_batches_are_split_over_data_and_fsdp():
    sharding = partitioning.batch_sharding(mesh_of(2, 4, 2))
    assert sharding.spec == PartitionSpec(("data", "fsdp"))
    assert sharding.shard_shape((16, 8, 8, 3)) == (2, 8, 8, 3)
