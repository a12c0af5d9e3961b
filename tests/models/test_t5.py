"""T5's encoder: agreement with t5x, and what does and does not influence a vector."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from imagen_jax.config.text import T5Config
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_t5x" / "encoder_golden.npz"
TINY = T5Config(vocab_size=40, emb_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=24)


@pytest.fixture(scope="module")
def tiny():
    ids = jax.random.randint(jax.random.key(1), (3, 9), 2, 40)
    mask = np.arange(9) < np.array([[4], [9], [0]])
    params = t5.T5Encoder(TINY).init(jax.random.key(0), ids, mask)["params"]
    return params, ids, mask


@jax.jit
def encode(params, ids, mask):
    return t5.T5Encoder(TINY).apply({"params": params}, ids, mask)


def test_buckets_equal_t5x():
    positions = np.arange(160)
    buckets = t5.relative_position_bucket(
        positions[None, :] - positions[:, None], num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(buckets, np.load(GOLDEN)["rel_bucket_160"])


def test_padding_is_inert_and_zero(tiny):
    params, ids, mask = tiny
    out = np.asarray(encode(params, ids, mask))
    garbage = np.asarray(encode(params, jnp.where(mask, ids, 39), mask))
    np.testing.assert_array_equal(out, garbage)
    assert not out[~mask].any()
    assert np.isfinite(out).all()
    assert np.abs(out[mask]).mean() > 0.1


def test_longer_padding_does_not_change_real_tokens(tiny):
    params, ids, mask = tiny
    short = t5.T5Encoder(TINY).apply({"params": params}, ids[:1, :4], mask[:1, :4])
    np.testing.assert_allclose(short[0], encode(params, ids, mask)[0, :4], atol=2e-6)


def test_order_of_tokens_matters(tiny):
    params, ids, mask = tiny
    turned = encode(params, ids[:, ::-1], jnp.ones_like(mask))[:, ::-1]
    assert np.abs(turned - encode(params, ids, jnp.ones_like(mask))).max() > 1e-2


def test_one_activation_has_one_input_kernel():
    config = dataclasses.replace(TINY, mlp_activations=("relu",))
    mlp = t5.parameter_shapes(config)["layers_0"]["mlp"]
    assert mlp["wi"]["kernel"].shape == (16, 24)
    assert set(mlp) == {"wi", "wo"}


def test_unknown_activation_is_named():
    config = dataclasses.replace(TINY, mlp_activations=("geglu",))
    with pytest.raises(ValueError, match="mlp_activations='geglu'.*did you mean 'gelu'"):
        t5.parameter_shapes(config)


@pytest.mark.parametrize(
    ("preset", "billions"),
    # With decoders of equally many (byt5: a third as many) layers: 11.1, 11.3, 0.060 and 12.9.
    [("t5_v1_1_xxl", 4.76), ("t5_11b", 4.87), ("t5_small", 0.035), ("byt5_xxl", 8.99)],
)
def test_presets_have_the_published_sizes(preset, billions):
    leaves = jax.tree.leaves(t5.parameter_shapes(t5.T5_PRESETS[preset]))
    assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_large_parameter_of_the_xxl_is_sharded():
    """A layer without logical axis names would have a replicated kernel."""
    mesh = AbstractMesh((1, 4, 2), partitioning.AXES, (AxisType.Auto,) * 3)
    boxed = t5.boxed_shapes(t5.T5_PRESETS["t5_v1_1_xxl"])
    shardings = jax.tree.leaves(partitioning.param_shardings(boxed, mesh))
    leaves = jax.tree.leaves(partitioning.unbox(boxed))
    parts = [s.shard_shape(leaf.shape) for leaf, s in zip(leaves, shardings, strict=True)]
    per_device = sum(int(np.prod(part)) for part in parts)
    total = sum(leaf.size for leaf in leaves)
    assert total > 4.7e9 and per_device < total / 8 * 1.001


def test_flops_are_those_the_compiler_counts():
    config = dataclasses.replace(TINY, emb_dim=64, head_dim=32, mlp_dim=256)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 64), jnp.bool_)
    shapes = {"params": t5.parameter_shapes(config)}
    counted = jax.jit(t5.T5Encoder(config).apply).lower(shapes, ids, mask).cost_analysis()
    # Norms, softmax and activations are a few per cent at this width and less at larger ones.
    assert 0.8 < t5.flops(config, 64) / counted["flops"] <= 1.0
    xxl = t5.T5_PRESETS["t5_v1_1_xxl"]
    assert t5.flops(xxl, 32) / 32 == pytest.approx(9.3e9, rel=0.01)
