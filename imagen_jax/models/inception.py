"""InceptionV3 (Szegedy et al. 2015, arXiv:1512.00567): FID uses the features of its last pool.

The network of TensorFlow's frozen graph of 2015-12-05, as used by the TTUR authors. Unlike later
versions of InceptionV3, average pools do not count the padding, and the last block has a maximum
pool instead of an average pool. Names of blocks and convolutions are those of the public torch
port. The classifier (1008 outputs) is omitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

INPUT_SIZE = 299  # Side of the images, pixels; the network accepts sides from 75.
FEATURES = 2048  # Channels of the last pool, pool3.
NORM_EPS = 1e-3

# Output channels and kernel (height, width) of consecutive convolutions.
Chain = Sequence[tuple[int, int, int]]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with fixed statistics, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j f"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        mean = self.param("mean", zeros, (self.features,))
        variance = self.param("variance", ones, (self.features,))
        scale = self.param("scale", ones, (self.features,))
        bias = self.param("bias", zeros, (self.features,))
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(variance + NORM_EPS)) + bias)


def _chain(x: Array, name: str, convolutions: Chain) -> Array:
    """Convolutions NAME_1, NAME_2, ...; a single one is called NAME."""
    for number, (features, height, width) in enumerate(convolutions, 1):
        full_name = name if len(convolutions) == 1 else f"{name}_{number}"
        x = ConvNorm(features, (height, width), name=full_name)(x)
    return x


def _halve(x: Array, name: str, features: int) -> Array:
    return ConvNorm(features, (3, 3), stride=2, padding="VALID", name=name)(x)


def _average(x: Array) -> Array:
    """3x3 average pool that does not count the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _half_maximum(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class BlockA(nn.Module):
    """35x35 pixels: parallel 5x5 and two 3x3 convolutions."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        parts = [
            _chain(x, "branch1x1", [(64, 1, 1)]),
            _chain(x, "branch5x5", [(48, 1, 1), (64, 5, 5)]),
            _chain(x, "branch3x3dbl", [(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
            _chain(_average(x), "branch_pool", [(self.pool_features, 1, 1)]),
        ]
        return jnp.concatenate(parts, -1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j f"]:
        double = ConvNorm(64, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        parts = [
            _halve(x, "branch3x3", 384),
            _halve(double, "branch3x3dbl_3", 96),
            _half_maximum(x),
        ]
        return jnp.concatenate(parts, -1)


class BlockC(nn.Module):
    """17x17: 7x7 as 1x7 and 7x1."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        w = self.width
        double = [(w, 1, 1), (w, 7, 1), (w, 1, 7), (w, 7, 1), (192, 1, 7)]
        parts = [
            _chain(x, "branch1x1", [(192, 1, 1)]),
            _chain(x, "branch7x7", [(w, 1, 1), (w, 1, 7), (192, 7, 1)]),
            _chain(x, "branch7x7dbl", double),
            _chain(_average(x), "branch_pool", [(192, 1, 1)]),
        ]
        return jnp.concatenate(parts, -1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j f"]:
        single = ConvNorm(192, (1, 1), name="branch3x3_1")(x)
        seven = x
        for number, kernel in enumerate([(1, 1), (1, 7), (7, 1)], 1):
            seven = ConvNorm(192, kernel, name=f"branch7x7x3_{number}")(seven)
        parts = [
            _halve(single, "branch3x3_2", 320),
            _halve(seven, "branch7x7x3_4", 192),
            _half_maximum(x),
        ]
        return jnp.concatenate(parts, -1)


class BlockE(nn.Module):
    """8x8: 3x3 as parallel 1x3 and 3x1."""

    pool: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        def forked(x: Array, name: str) -> list[Array]:
            return [
                ConvNorm(384, (1, 3), name=f"{name}a")(x),
                ConvNorm(384, (3, 1), name=f"{name}b")(x),
            ]

        single = ConvNorm(384, (1, 1), name="branch3x3_1")(x)
        double = ConvNorm(448, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(double)
        pooled = _average(x) if self.pool == "average" else nn.max_pool(x, (3, 3), (1, 1), "SAME")
        parts = [
            ConvNorm(320, (1, 1), name="branch1x1")(x),
            *forked(single, "branch3x3_2"),
            *forked(double, "branch3x3dbl_3"),
            ConvNorm(192, (1, 1), name="branch_pool")(pooled),
        ]
        return jnp.concatenate(parts, -1)


class Inception(nn.Module):
    """Images to the 2048 features of the last pool."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Features of images.

        Args:
          x: float32 images in about [-1, 1], of side `INPUT_SIZE`.
        """
        x = _halve(x, "Conv2d_1a_3x3", 32)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _half_maximum(x)
        x = ConvNorm(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _half_maximum(x)
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = BlockC(width, name=f"Mixed_6{name}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE("average", name="Mixed_7b")(x)
        x = BlockE("maximum", name="Mixed_7c")(x)
        return x.mean((1, 2))


def param_shapes() -> dict:
    """Shapes (`jax.ShapeDtypeStruct`) of all parameters."""
    x = jnp.zeros((1, INPUT_SIZE, INPUT_SIZE, 3))
    return jax.eval_shape(lambda: Inception().init(jax.random.key(0), x))["params"]
