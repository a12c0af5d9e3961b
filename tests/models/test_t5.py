"""T5's encoder: agreement with t5x, and what must and must not influence a vector."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import T5Config
from imagen_jax.models import t5

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
