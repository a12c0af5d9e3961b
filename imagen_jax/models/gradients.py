"""Linear layers whose weight gradients are summed over devices in a chosen dtype.

In bfloat16, a layer casts its float32 kernel to the dtype of the input. Differentiated as written,
the gradient of the cast kernel is bfloat16, and XLA sums it over the devices that share the
parameter before the cast back: every addend is rounded to 8 bits first. Here the product that gives
the gradient has the dtype of `reduce_dtype`, and so has the sum over devices. In float32 the layers
are unchanged.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = ("float32", "bfloat16")

_REDUCE = contextvars.ContextVar("reduce_dtype", default="float32")


@contextlib.contextmanager
def reduce_dtype(dtype: str) -> Iterator[None]:
    """Sets the dtype of weight gradients for layers traced within."""
    token = _REDUCE.set(dtype)
    try:
        yield
    finally:
        _REDUCE.reset(token)


def product(x: Float[Array, "rows i"], kernel: Float[Array, "i o"]) -> Float[Array, "rows o"]:
    """x @ kernel in the dtype of x."""
    if x.dtype == kernel.dtype:
        return jnp.matmul(x, kernel)
    return _product(x, kernel, _REDUCE.get())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, dtype: str) -> Array:
    return jnp.matmul(x, kernel.astype(x.dtype))


def _product_fwd(x: Array, kernel: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, dtype), (x, kernel)


def _product_bwd(dtype: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = jnp.matmul(x.T, g, preferred_element_type=jnp.dtype(dtype))
    return jnp.matmul(g, kernel.astype(g.dtype).T), gradient.astype(kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def add_bias(x: Float[Array, "*n c"], bias: Float[Array, " c"]) -> Float[Array, "*n c"]:
    """x + bias in the dtype of x."""
    if x.dtype == bias.dtype:
        return x + bias
    return _add_bias(x, bias, _REDUCE.get())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_bias(x: Array, bias: Array, dtype: str) -> Array:
    return x + bias.astype(x.dtype)


def _add_bias_fwd(x: Array, bias: Array, dtype: str) -> tuple[Array, Array]:
    return _add_bias(x, bias, dtype), bias


def _add_bias_bwd(dtype: str, bias: Array, g: Array) -> tuple[Array, Array]:
    gradient = g.reshape(-1, g.shape[-1]).sum(axis=0, dtype=jnp.dtype(dtype))
    return g, gradient.astype(bias.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def convolution(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    strides: Sequence[int],
    padding: Any,
) -> Float[Array, "b h2 w2 o"]:
    """2-D convolution, NHWC and HWIO, in the dtype of x."""
    pads = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in pads)
    if x.dtype == kernel.dtype:
        return _forward(x, kernel, tuple(strides), pads)
    return _convolution(x, kernel, tuple(strides), pads, _REDUCE.get())


def _forward(x: Array, kernel: Array, strides: Any, pads: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(x: Array, kernel: Array, strides: Any, pads: Any, dtype: str) -> Array:
    return _forward(x, kernel.astype(x.dtype), strides, pads)


def _convolution_fwd(x: Array, kernel: Array, strides: Any, pads: Any, dtype: str):
    return _convolution(x, kernel, strides, pads, dtype), (x, kernel)


def _convolution_bwd(strides: Any, pads: Any, dtype: str, saved: tuple[Array, Array], g: Array):
    x, kernel = saved
    cast = kernel.astype(x.dtype)
    (to_x,) = jax.linear_transpose(lambda v: _forward(v, cast, strides, pads), x)(g)
    # dK[h, w, i, o] = sum over b, y, x of x[b, s y + h, s x + w, i] g[b, y, x, o]: a convolution
    # whose batch is i, whose contracted features are the examples, and whose kernel is g.
    ends = [
        (low, size - 1 + (out - 1) * stride + 1 - length - low)
        for (low, _), size, out, stride, length in zip(
            pads, kernel.shape[:2], g.shape[1:3], strides, x.shape[1:3], strict=True
        )
    ]
    gradient = jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        ends,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.dtype(dtype),
    )
    return to_x, gradient.astype(kernel.dtype)


_convolution.defvjp(_convolution_fwd, _convolution_bwd)
