"""Meshes: errors for sizes that do not divide; a sharded step equals the unsharded one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from imagen_jax.config import overrides
from imagen_jax.config import schema as config_lib
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import MeshConfig
from imagen_jax.parallel import partitioning

ROOT = pathlib.Path(__file__).parents[2]


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
    with pytest.raises(ConfigError, match="set config.mesh.data=-1"):
        partitioning.make_mesh(MeshConfig(data=devices + 1))


def run(config, optimizer: str):
    """The result of tests/reference/sharded_step.py."""
    program = [sys.executable, "-m", "tests.reference.sharded_step"]
    result = subprocess.run(
        [*program, overrides.to_json(config), optimizer],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def steps(base_config):
    return run(base_config, "adam")


def check_equal(step):
    # Only the order of the sums differs: 1e-7 per operation, about a hundred in sequence.
    assert abs(step["loss"]) < 1e-5 and abs(step["grad_norm"]) < 1e-5
    assert step.get("gradient_error", 0.0) < 1e-4
    assert step["update_error"] < 1e-4
    assert step["update_scale"] > 1e-5


@pytest.mark.parametrize("mesh", ["data2_fsdp4", "data4_tensor2", "data2_fsdp2_tensor2"])
def test_a_sharded_step_equals_the_unsharded_step(steps, mesh):
    assert "gradient_error" in steps[mesh]
    check_equal(steps[mesh])


@pytest.mark.parametrize(
    ("mesh", "conv", "dense"),
    [
        ("data2_fsdp4", [3, 3, 2, 8], [4, 16]),
        ("data4_tensor2", [3, 3, 8, 4], [16, 8]),
        ("data2_fsdp2_tensor2", [3, 3, 4, 4], [8, 8]),
    ],
)
def test_parameters_averages_and_moments_are_sharded(steps, mesh, conv, dense):
    assert steps[mesh]["shards"] == {"conv": conv, "ema": conv, "dense": dense, "mu": dense}


@pytest.mark.slow
def test_factored_slots_are_sharded_along_their_remaining_axis(base_config):
    step = run(base_config, "adafactor")["data2_fsdp2_tensor2"]
    check_equal(step)
    shards = step["shards"]
    assert shards["dense"] == [64, 64] and shards["v_row"] == [64] and shards["v_col"] == [64]


def test_constraints_on_activations_take_effect(steps):
    """Every device has all inputs: 8 images, 4 heads."""
    assert steps["unconstrained"] == [[8, 4]]
    assert steps["constrained"] == [[2, 2]]


def test_a_slot_of_another_shape_is_replicated():
    sharding = jax.sharding.NamedSharding(mesh_of(1, 4, 2), PartitionSpec("fsdp", "tensor"))
    for slot, spec in [
        ((8, 6), ("fsdp", "tensor")),
        ((8,), ("fsdp",)),
        ((6,), ("tensor",)),
        ((1,), ()),
    ]:
        assert partitioning.slot_sharding(slot, (8, 6), sharding).spec == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("fields", "tensor", "nearest"),
    [
        ({}, 3, 2),  # 16, 24 and 32 heads
        ({}, 16, 8),
        ({"head_dim": 512}, 8, 1),  # 2, 3 and 4 heads
        ({"channels": (96, 160), "head_dim": 32}, 4, 1),
    ],
)
def test_a_tensor_axis_that_does_not_divide_heads(fields, tensor, nearest):
    levels = len(fields.get("channels", (0,) * 4))
    attends = (False,) + (True,) * (levels - 1)
    model = config_lib.ModelConfig(
        **{"num_res_blocks": (1,) * levels, "self_attention": attends, "cross_attention": attends}
        | fields
    )
    partitioning.check_tensor(model, mesh_of(2, 2, nearest))
    with pytest.raises(ConfigError) as error:
        partitioning.check_tensor(model, mesh_of(2, 2, tensor))
    message = str(error.value)
    assert message.startswith(f"config.mesh.tensor={tensor} must divide config.model.channels=")
    assert message.endswith(f"; try {nearest}")


def test_batches_are_sharded_over_data_and_fsdp():
    sharding = partitioning.batch_sharding(mesh_of(2, 4, 2))
    assert sharding.spec == PartitionSpec(("data", "fsdp"))
    assert sharding.shard_shape((16, 8, 8, 3)) == (2, 8, 8, 3)
