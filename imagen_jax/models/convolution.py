"""Convolutions whose gradients are fast on every device.

XLA's CPU backend takes longer over the gradient of a kernel than over the convolution itself, most
for large pictures; as a matrix product it takes less (benchmarks/shapes_step.py times both).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax import partitioning

NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], *given: Any, **more: Any
) -> Float[Array, "b h2 w2 d"]:
    """`jax.lax.conv_general_dilated`, as `flax.linen.Conv` calls it."""
    strides, padding, *_ = given
    plain = strides == (1, 1) and padding == "SAME" and kernel.shape[0] % 2 == 1
    if plain and partitioning.platform() == "cpu":
        return _same(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, *given, **more)


@jax.custom_vjp
def _same(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"]) -> Float[Array, "b h w d"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _same(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    # Turned by half a turn, with inputs and outputs swapped, the kernel takes gradients back.
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _same(gradient, turned), _kernel_gradient(x, gradient, len(kernel))


def _kernel_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h w d"], size: int
) -> Float[Array, "k k c d"]:
    """Sum over pixels of x, shifted, times the gradient: a product of two matrices.

    Shifts along the height stand beside each other on the side of x, those along the width on the
    side of the gradient: the product has all pairs and nothing else, and both sides stay small.
    """
    around = size // 2
    (_, height, width, channels), features = x.shape, gradient.shape[-1]
    x = jnp.pad(x, ((0, 0), (around, around), (0, 0), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (0, 0), (around, around), (0, 0)))
    down = jnp.concatenate([x[:, i : i + height] for i in range(size)], axis=-1)
    # Where x would be shifted to the right, the gradient is to the left.
    along = [gradient[:, :, j : j + width] for j in reversed(range(size))]
    across = jnp.concatenate(along, axis=-1)
    product = down.reshape(-1, size * channels).T @ across.reshape(-1, size * features)
    return product.reshape(size, channels, size, features).swapaxes(1, 2)


_same.defvjp(_forward, _backward)
