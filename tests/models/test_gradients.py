"""Weight gradients of bfloat16 layers: their values, and the dtype in which devices sum them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models import gradients


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


CONVOLUTIONS = [
    (size, kernel, stride) for size in (8, 7) for kernel in (1, 3) for stride in (1, 2, 3)
]


@pytest.mark.parametrize(("size", "kernel", "stride"), CONVOLUTIONS)
def test_gradients_of_a_convolution(size, kernel, stride):
    """Against JAX's own gradient, on the same bfloat16 values computed in float32."""
    x = random(2, size, size + 1, 5, dtype=jnp.bfloat16)
    weights = random(kernel, kernel, 5, 6, seed=1).astype(jnp.bfloat16).astype(jnp.float32)

    def loss(x, weights):
        y = gradients.convolution(x, weights, (stride, stride), "SAME")
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y.astype(jnp.float32))

    def plain(x, weights):
        y = jax.lax.conv_general_dilated(
            x, weights, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)).astype(jnp.bfloat16) * y)

    ours = jax.grad(loss, argnums=(0, 1))(x, weights)
    exact = jax.grad(plain, argnums=(0, 1))(x.astype(jnp.float32), weights)
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == jnp.float32
    np.testing.assert_allclose(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[0].astype(jnp.float32), exact[0], rtol=2e-2, atol=2e-2)


def test_gradients_of_a_product_and_a_bias():
    x, weights = random(64, 5, dtype=jnp.bfloat16), random(5, 6, seed=1)
    bias, g = random(6, seed=2), random(64, 6, seed=3).astype(jnp.bfloat16)

    def loss(weights, bias):
        y = gradients.add_bias(gradients.product(x, weights), bias)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y * g, dtype=jnp.float32)

    of_weights, of_bias = jax.grad(loss, argnums=(0, 1))(weights, bias)
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    np.testing.assert_allclose(of_weights, x.T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_bias, g.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", gradients.DTYPES)
def test_the_gradient_is_computed_in_the_chosen_dtype(dtype):
    """In the jaxpr: the operation whose result XLA sums over devices."""
    x, image = random(8, 4, dtype=jnp.bfloat16), random(2, 4, 4, 4, dtype=jnp.bfloat16)
    weights, kernel, bias = random(4, 4), random(3, 3, 4, 4), random(4)

    def loss(weights, kernel, bias):
        y = gradients.add_bias(gradients.product(x, weights), bias)
        z = gradients.convolution(image, kernel, (1, 1), "SAME")
        return jnp.sum(y, dtype=jnp.float32) + jnp.sum(z, dtype=jnp.float32)

    with gradients.reduce_dtype(dtype):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(weights, kernel, bias)
    results = {
        (
            equation.primitive.name,
            equation.outvars[0].aval.shape,
            str(equation.outvars[0].aval.dtype),
        )
        for equation in jaxpr.eqns
    }
    assert ("dot_general", (4, 4), dtype) in results
    assert ("conv_general_dilated", (3, 3, 4, 4), dtype) in results
    assert ("reduce_sum", (4,), dtype) in results


def test_float32_layers_are_jax_s_own():
    x, weights = random(8, 4), random(4, 4, seed=1)
    text = str(jax.make_jaxpr(gradients.product)(x, weights))
    assert "custom_vjp" not in text
