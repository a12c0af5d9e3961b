"""Layers against other implementations of the same formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from imagen_jax.models import attention, layers


def normal(*shape, seed=0, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, shape), jnp.float32)


def value_and_slopes(function, *arrays):
    """Output of a function, and the gradients of a weighted sum of it."""
    out = function(*arrays)
    weight = normal(*out.shape, seed=9)
    slopes = jax.grad(lambda *a: jnp.vdot(weight, function(*a)), tuple(range(len(arrays))))
    return out, *slopes(*arrays)


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(jnp.abs(other).max()))


def test_gelu():
    """Against SciPy's normal distribution, by value and slope."""
    x = np.linspace(-12.0, 12.0, 2001).astype(np.float32)
    expected = x * scipy.special.ndtr(x.astype(np.float64))
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6, rtol=1e-6)
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x))
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(
        slope, scipy.special.ndtr(x.astype(np.float64)) + x * density, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 4, 5, 24), (2, 7, 24)], ids=["pixels", "tokens"])
def test_group_norm(shape):
    """Against Flax's, by value and gradient, of inputs far from mean 0; then modulated."""
    x, learned = normal(*shape, mean=2.0, std=3.0), {}
    for index, name in enumerate(("scale", "bias")):
        learned[name] = normal(shape[-1], seed=index + 1)
    flax = nn.GroupNorm(4, epsilon=1e-5)
    assert jax.tree.map(jnp.shape, flax.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, layers.group_norm(4, "n").init(jax.random.key(0), x)
    )

    def ours(x, learned, *modulation):
        return layers.group_norm(4, "n").apply({"params": learned}, x, *modulation)

    def theirs(x, learned, scale=0.0, shift=0.0):
        return flax.apply({"params": learned}, x) * (1.0 + scale) + shift

    for given in (ours, theirs):
        assert given(x, learned).dtype == jnp.float32
    assert_same(
        jax.tree.leaves(value_and_slopes(ours, x, learned)),
        jax.tree.leaves(value_and_slopes(theirs, x, learned)),
        1e-5,
    )
    scale, shift = normal(shape[0], shape[-1], seed=3), normal(shape[0], shape[-1], seed=4)
    pixels = tuple(range(1, x.ndim - 1))
    wide = [jnp.expand_dims(m, pixels) for m in (scale, shift)]
    assert_same([ours(x, learned, scale, shift)], [theirs(x, learned, *wide)], 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention(dtype, masked):
    """Against JAX's own, by value and gradient, with all, some and one of the keys."""
    query, key, value = (normal(3, n, 2, 8, seed=n, std=2.0).astype(dtype) for n in (5, 7, 7))
    mask = jnp.arange(7) < jnp.array([7, 4, 1])[:, None] if masked else None

    def ours(query, key, value):
        return attention.softmax_attention(query, key, value, mask).astype(jnp.float32)

    def theirs(query, key, value):
        wide = None if mask is None else mask[:, None, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=wide, implementation="xla")
        return out.astype(jnp.float32)

    found, expected = (value_and_slopes(f, query, key, value) for f in (ours, theirs))
    assert found[1].dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_same(*(jax.tree.map(jnp.float32, leaves) for leaves in (found, expected)), tolerance)


def test_masked_keys_have_no_effect_on_attention():
    """Even if they are large; if all keys are masked, the result is the mean of the values."""
    query, key, value = (normal(1, n, 2, 8, seed=n) for n in (5, 7, 7))
    none = attention.softmax_attention(query, key, value, jnp.zeros((1, 7), bool))
    mean = jnp.broadcast_to(value.mean(1, keepdims=True), none.shape)
    np.testing.assert_allclose(none, mean, rtol=1e-5, atol=1e-6)
    mask = jnp.arange(7)[None] < 4
    out = attention.softmax_attention(query, key, value, mask)
    key, value = (x.at[:, 4:].set(1e4) for x in (key, value))
    np.testing.assert_array_equal(out, attention.softmax_attention(query, key, value, mask))


def test_dense_is_a_product_of_the_last_axis():
    x, net = normal(2, 3, 4, 5), layers.dense(6, "d")
    params = net.init(jax.random.key(0), x)
    learned = nn.meta.unbox(params)["params"]
    expected = np.einsum("abcd,de->abce", x, learned["kernel"]) + learned["bias"]
    np.testing.assert_allclose(net.apply(params, x), expected, atol=1e-5)
    assert net.apply(params, x[0, 0, 0]).shape == (6,)
