"""The layers that are our own against those of Flax and SciPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from imagen_jax.models import convolution, layers

SHAPE = (3, 6, 4, 8)


@pytest.fixture
def pixels():
    return jnp.asarray(np.random.default_rng(0).normal(size=SHAPE) * 2.0 + 1.0, jnp.float32)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_group_norm(pixels, groups, modulated):
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=SHAPE[-1]).astype(np.float32) for name in ("scale", "bias")}
    scale, shift = jnp.asarray(rng.normal(size=(2, SHAPE[0], SHAPE[-1])), jnp.float32)

    def ours(x, params):
        modulation = (scale, shift) if modulated else None
        return layers.GroupNorm(groups).apply({"params": params}, x, modulation)

    def theirs(x, params):
        out = nn.GroupNorm(groups, epsilon=1e-5).apply({"params": params}, x)
        return out * (1 + scale[:, None, None]) + shift[:, None, None] if modulated else out

    np.testing.assert_allclose(ours(pixels, params), theirs(pixels, params), atol=1e-5)
    weight = rng.normal(size=SHAPE).astype(np.float32)
    gradients = [
        jax.grad(lambda *given, run=run: (run(*given) * weight).sum(), argnums=(0, 1))
        for run in (ours, theirs)
    ]
    found, expected = (gradient(pixels, params) for gradient in gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_group_norm_is_float32_for_bfloat16(pixels):
    out = layers.GroupNorm(2).apply(
        {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, jnp.asarray(pixels, jnp.bfloat16)
    )
    assert out.dtype == jnp.float32
    groups = np.asarray(out).reshape(3, 24, 2, 4)
    np.testing.assert_allclose(groups.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1.0, atol=1e-4)


def test_gelu():
    x = np.linspace(-12.0, 12.0, 2001).astype(np.float32)
    expected = x * scipy.special.ndtr(x.astype(np.float64))
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6, rtol=1e-6)
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x))
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(
        slope, scipy.special.ndtr(x.astype(np.float64)) + x * density, atol=1e-6
    )


def test_downsample(pixels):
    expected = nn.avg_pool(jnp.asarray(pixels), (2, 2), (2, 2))
    np.testing.assert_allclose(layers.downsample(jnp.asarray(pixels)), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradients_of_a_convolution_on_cpus(pixels, size):
    """As products, against XLA's own."""
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=(size, size, SHAPE[-1], 5)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(*SHAPE[:-1], 5)), jnp.float32)
    layout = {"dimension_numbers": convolution.NHWC}

    def gradients(convolve):
        loss = lambda x, k: (convolve(x, k, (1, 1), "SAME", **layout) * weight).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(pixels, kernel)

    found, expected = gradients(convolution.convolve), gradients(jax.lax.conv_general_dilated)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), found, expected
    )


def test_a_strided_convolution_is_the_plain_one(pixels):
    kernel = jnp.ones((3, 3, SHAPE[-1], 2))
    layout = {"dimension_numbers": convolution.NHWC}
    for strides, padding in (((2, 2), "SAME"), ((1, 1), "VALID")):
        found = convolution.convolve(pixels, kernel, strides, padding, **layout)
        expected = jax.lax.conv_general_dilated(pixels, kernel, strides, padding, **layout)
        np.testing.assert_array_equal(found, expected)
