"""Building blocks shared by the U-Nets: convolutions, norms and residual blocks.

Every kernel names its logical axes, so that `partitioning.RULES` can shard it. Parameters are
float32; activations have the dtype of the input; norms compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import gradients
from imagen_jax.parallel import partitioning


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the standard normal distribution function of x, exact (Hendrycks & Gimpel 2016).

    Computed with erf, as in torch. JAX's gelu uses erfc, which is more precise for outputs near
    zero and costs more than twice as much on CPUs.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swish": nn.swish, "gelu": gelu}

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def remat_block(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """`block`, recomputed in the backward pass unless `model.remat` is "none"."""
    if policy == "none":
        return block
    # `train`, the third argument of a residual block after self, is static.
    return nn.remat(block, static_argnums=(3,) if block is ResBlock else ())


def remat_level(level: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`level(module, *arrays)`, recomputed in the backward pass if `model.remat` is "full"."""
    return nn.remat(level) if policy == "full" else level


class Dense(nn.Module):
    """Linear layer over the last axis, in the dtype of the input.

    Attributes:
      features: output channels.
      kernel_init: initialiser of the kernel, with its logical axes.
    """

    features: int
    kernel_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        # Batch and tokens are flattened to rows: XLA transposes less.
        rows = gradients.product(x.reshape(-1, x.shape[-1]), kernel)
        return gradients.add_bias(rows, bias).reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """2-D convolution with SAME padding, in the dtype of the input.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: of both axes.
      kernel_init: initialiser of the kernel, with its logical axes.
    """

    features: int
    kernel_size: int
    stride: int
    kernel_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = gradients.convolution(x, kernel, (self.stride, self.stride), "SAME")
        return gradients.add_bias(y, bias)


def dense(features: int, name: str, *, zero_init: bool = False) -> Dense:
    """Linear layer over the last axis."""
    init = nn.initializers.zeros if zero_init else _FAN_IN
    return Dense(features, nn.with_logical_partitioning(init, ("embed", "mlp")), name=name)


def conv(
    features: int, name: str, *, kernel: int = 3, stride: int = 1, zero_init: bool = False
) -> Conv:
    """Square 2-D convolution, SAME padding."""
    init = nn.initializers.zeros if zero_init else _FAN_IN
    axes = ("conv_height", "conv_width", "conv_in", "conv_out")
    kernel_init = nn.with_logical_partitioning(init, axes)
    return Conv(features, kernel, stride, kernel_init, name=name)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018, Eq. 1) in float32, followed by scale and shift.

    Moments are computed per channel, then averaged per group. Normalisation and modulation are
    combined into one factor and one offset per example and channel, so loops over pixels run along
    whole channels, forward and backward.
    """

    num_groups: int
    epsilon: float = 1e-5
    # Subtract the mean before the moments are computed: where the values of a group hardly differ,
    # as tokens of padding do, the difference of their moments has no correct digit.
    centred: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *pixels c"],
        scale: Float[Array, "b c"] | float = 0.0,
        shift: Float[Array, "b c"] | float = 0.0,
    ) -> Float[Array, "b *pixels c"]:
        """norm(x) * (1 + scale) + shift; float32."""
        channels, pixels = x.shape[-1], tuple(range(1, x.ndim - 1))
        learned_scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)
        if self.centred:
            means = jnp.broadcast_to(x.mean(pixels)[:, None], (x.shape[0], 2, channels))
            x = x - jnp.expand_dims(self._over_groups(means)[:, 0], pixels)
        moments = jnp.stack([x.mean(pixels), jnp.square(x).mean(pixels)], axis=1)
        mean, square = self._over_groups(moments).swapaxes(0, 1)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * learned_scale
        offset = bias - mean * factor
        factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        return x * jnp.expand_dims(factor, pixels) + jnp.expand_dims(offset, pixels)

    def _over_groups(self, means: Float[Array, "b 2 c"]) -> Float[Array, "b 2 c"]:
        """Each channel's mean replaced by that of its group.

        Two matrix products: with indexing, XLA's CPU backend repeats the lookup for every pixel.
        """
        size = means.shape[-1] // self.num_groups
        member = jnp.repeat(jnp.eye(self.num_groups), size, axis=0)
        groups = jnp.matmul(means, member / size, precision="highest")
        return jnp.matmul(groups, member.T, precision="highest")


def group_norm(num_groups: int, name: str, *, centred: bool = False) -> GroupNorm:
    """GroupNorm with float32 statistics."""
    return GroupNorm(num_groups, centred=centred, name=name)


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """Moves factor x factor patches into the channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """Inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Averages 2 x 2 pixels."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Repeats every pixel 2 x 2 times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResBlock(nn.Module):
    """GroupNorm, swish, conv, GroupNorm with scale and shift from the embedding, swish, conv.

    The residual block of ADM (BigGAN-style: both branches are resampled inside) and of the
    Efficient U-Net (Fig. A.27), whose shortcut is always a 1x1 convolution.

    Attributes:
      config: shape of the network.
      features: output channels.
      resample: none, down or up.
      always_project: whether the shortcut is a 1x1 convolution even at equal widths.
    """

    config: ModelConfig
    features: int
    resample: str = "none"
    always_project: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], train: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        cfg = self.config
        activation = ACTIVATIONS[cfg.activation]
        resample = {"none": lambda v: v, "down": downsample, "up": upsample}[self.resample]
        h = activation(group_norm(cfg.num_groups, "norm_in")(x)).astype(x.dtype)
        h = conv(self.features, "conv_in")(resample(h))
        modulation = dense(2 * self.features, "modulation")(activation(embedding))
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = group_norm(cfg.num_groups, "norm_out")(h, scale, shift)
        h = activation(h).astype(x.dtype)
        h = nn.Dropout(cfg.dropout)(h, deterministic=not train)
        h = conv(self.features, "conv_out", zero_init=True)(h)
        x = resample(x)
        if self.always_project or x.shape[-1] != self.features:
            x = conv(self.features, "shortcut", kernel=1)(x)
        out = (x + h) / cfg.residual_divisor
        return partitioning.constrain(out, ("batch", "height", None, "channels"))
