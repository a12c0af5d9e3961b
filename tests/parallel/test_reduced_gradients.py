"""How XLA for TPUs reduces the gradient of a sharded kernel: the rule of docs/plan.md."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.config.schema import MeshConfig
from imagen_jax.parallel import hlo, partitioning, topology
from imagen_jax.planning import plan

CONVOLUTION = {"window_strides": (1, 1), "padding": "SAME"}
LAYOUT = ("NHWC", "HWIO", "NHWC")


def loss(kernel, x):
    for _ in range(2):
        x = jax.nn.silu(
            jax.lax.conv_general_dilated(
                x, kernel.astype(x.dtype), **CONVOLUTION, dimension_numbers=LAYOUT
            )
        )
    return jnp.sum(x.astype(jnp.float32) ** 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("name", "fsdp", "channels", "scattered"),
    [
        # Parts of 16 rows, the height of a bfloat16 tile, and of 8.
        ("v5e-256", 32, 512, True),
        ("v5e-256", 64, 512, False),
        ("v5e-256", 64, 1024, True),
        ("v5e-256", 128, 1024, False),
        # The whole slice, whatever the height.
        ("v5e-256", 256, 4096, False),
        ("v6e-64", 64, 2048, False),
        ("v6e-64", 32, 2048, True),
    ],
)
def test_gradients_are_reduced_to_each_part_where_it_is_a_tile_high(
    name, fsdp, channels, scattered
):
    where = topology.open_slice(name)
    mesh = partitioning.make_mesh(MeshConfig(fsdp=fsdp), where.devices)
    parts = NamedSharding(mesh, PartitionSpec(None, None, "fsdp", None))
    rows = partitioning.batch_sharding(mesh)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32, sharding=parts)
    x = jax.ShapeDtypeStruct((2048, 16, 16, channels), jnp.bfloat16, sharding=rows)
    run = jax.jit(jax.grad(loss), out_shardings=parts).lower(kernel, x).compile(plan.QUICK)
    sent = {one.kind: one.bytes for one in hlo.collectives(run.as_text(), 1)}
    # Two gradients of two bytes per parameter.
    whole = 2 * 2 * kernel.size
    assert sent.get("reduce-scatter", 0) == (whole if scattered else 0)
    # Scattered parts are small in the sum over the data axis that follows.
    assert (sent.get("all-reduce", 0) < whole / 8) == scattered
