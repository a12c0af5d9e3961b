"""Building blocks shared by the U-Nets: convolutions, norms, residual and attention blocks.

Every kernel names its logical axes, so that `partitioning` can lay it over a mesh by one table of
rules. Parameters are float32; activations have the dtype of the input; norms compute in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.parallel import partitioning


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the normal distribution up to x, exact (Hendrycks & Gimpel 2016).

    By erf, as torch has it. JAX's own takes erfc, which keeps the digits of outputs near zero that
    no sum with others notices, and costs more than twice as much on CPUs.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swish": nn.swish, "gelu": gelu}

TEXT_GROUPS = 32  # of the GroupNorm on text tokens, IF's

POSITION_STD = 0.5  # of a position embedding at the start, beside tokens of variance one

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _input_dtype(*arrays: Array | None, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Casts float32 parameters to the input; Flax's own rule would widen the input instead."""
    del dtype, inexact
    x: Any = arrays[0]
    return [x, *(None if p is None else p.astype(x.dtype) for p in arrays[1:])]


def remat_block(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """`block`, whose inside the backward pass computes again if `model.remat` asks for it."""
    if policy == "none":
        return block
    # `train`, the third argument of a residual block after self, is no array.
    return nn.remat(block, static_argnums=(3,) if block is ResBlock else ())


def remat_level(level: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`level(module, *arrays)`, computed again in the backward pass if `model.remat` is full."""
    return nn.remat(level) if policy == "full" else level


def _product(x: Array, kernel: Array, *dimensions: Any, **options: Any) -> Array:
    """The product of `nn.Dense`, its batch and tokens as rows: XLA then transposes less."""
    del dimensions
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows, kernel, **options).reshape(*x.shape[:-1], -1)


def dense(features: int, name: str, *, zero_init: bool = False) -> nn.Dense:
    """Linear layer over the last axis."""
    init = nn.initializers.zeros if zero_init else _FAN_IN
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")),
        dot_general=_product,
        promote_dtype=_input_dtype,
        name=name,
    )


def conv(
    features: int, name: str, *, kernel: int = 3, stride: int = 1, zero_init: bool = False
) -> nn.Conv:
    """Square 2-D convolution, SAME padding."""
    init = nn.initializers.zeros if zero_init else _FAN_IN
    axes = ("conv_height", "conv_width", "conv_in", "conv_out")
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        kernel_init=nn.with_logical_partitioning(init, axes),
        promote_dtype=_input_dtype,
        name=name,
    )


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018, Eq. 1), in float32, and the modulation of what it gives.

    Sums over pixels are taken per channel and only then per group; all that follows from them
    becomes a factor and an offset per example and channel. So the loops over the pixels, forward
    and backward, run along whole channels.
    """

    num_groups: int
    epsilon: float = 1e-5

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
        moments = jnp.stack([x.mean(pixels), jnp.square(x).mean(pixels)], axis=1)
        mean, square = self._over_groups(moments).swapaxes(0, 1)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * learned_scale
        offset = bias - mean * factor
        factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        return x * jnp.expand_dims(factor, pixels) + jnp.expand_dims(offset, pixels)

    def _over_groups(self, means: Float[Array, "b 2 c"]) -> Float[Array, "b 2 c"]:
        """Each channel's mean replaced by its group's.

        As products: a product is computed once, where XLA's CPU backend would look a group up for
        every pixel again.
        """
        size = means.shape[-1] // self.num_groups
        member = jnp.repeat(jnp.eye(self.num_groups), size, axis=0)
        groups = jnp.matmul(means, member / size, precision="highest")
        return jnp.matmul(groups, member.T, precision="highest")


def group_norm(num_groups: int, name: str) -> GroupNorm:
    """GroupNorm with float32 statistics."""
    return GroupNorm(num_groups, name=name)


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


def attend(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    *,
    heads: int,
    mask: Bool[Array, "b k"] | None,
) -> Float[Array, "b q c"]:
    """Multi-head attention, softmax(q k / sqrt(head_dim)) v; `mask` is True where a key counts."""

    def split(x: Array) -> Array:
        x = x.reshape(*x.shape[:2], heads, -1)
        return partitioning.constrain(x, ("batch", None, "heads", None))

    query, key, value = split(query), split(key), split(value)
    if attention_implementation(query, key, jax.default_backend()) == "xla":
        out = softmax_attention(query, key, value, mask)
    else:
        if mask is not None:  # A row for every query.
            mask = jnp.repeat(mask[:, None, None], query.shape[1], axis=2)
        out = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    return out.reshape(*out.shape[:2], -1)


def softmax_attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"] | None,
) -> Float[Array, "b q n d"]:
    """softmax(q k / sqrt(d)) v for each of n heads, the softmax in float32.

    Divides by the softmax's sum after the product with the values (Dao et al. 2022, Sec. 3.1):
    fewer passes over [q, k], above all in the gradient. Where all keys are masked, all count alike.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    logits = product(query * query.shape[-1] ** -0.5, key.swapaxes(2, 3))
    if mask is not None:
        logits += jnp.where(mask, 0.0, 0.7 * jnp.finfo(jnp.float32).min)[:, None, None]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = product(weights.astype(value.dtype), value) / weights.sum(-1, keepdims=True)
    return out.swapaxes(1, 2).astype(query.dtype)


def attention_implementation(
    query: Array | jax.ShapeDtypeStruct, key: Array | jax.ShapeDtypeStruct, backend: str
) -> Literal["cudnn", "xla"]:
    """cudnn where its fused attention takes the work, xla elsewhere.

    The fused kernel never writes the [queries, keys] matrix to memory. It takes half precision, at
    most 128 channels per head in multiples of 8, and, to be differentiable under a mask, even
    numbers of queries and keys; a single query gains nothing.

    Args:
      query: [B, Q, heads, channels].
      key: [B, K, heads, channels].
      backend: `jax.default_backend()`.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    channels, even = query.shape[-1], query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    fits = half and even and channels <= 128 and channels % 8 == 0
    return "cudnn" if backend == "gpu" and fits else "xla"


class ResBlock(nn.Module):
    """GroupNorm, swish, conv, GroupNorm with scale and shift from the embedding, swish, conv.

    The residual block of ADM (BigGAN-style: `resample` happens inside, on both branches) and of the
    Efficient U-Net (Fig. A.27), whose shortcut is always a 1x1 convolution.
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
        return partitioning.constrain(out, ("batch", None, None, "channels"))


class AttentionBlock(nn.Module):
    """Pixels attend to pixels, to text, or to both at once; residual.

    With `pixels` and text given, text keys/values are concatenated to the pixels' own, as the paper
    does in the base and 64->256 models (Sec. 2.1); with text alone it is cross-attention
    (256->1024). Differs from paper if `position_embedding` is on: a learned vector tells a pixel
    where it is, as in a ViT (Dosovitskiy et al. 2021, Eq. 1); else convolutions alone do.
    """

    config: ModelConfig
    pixels: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "b l d"] | None,
        mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h w c"]:
        cfg = self.config
        b, height, width, c = x.shape
        tokens = group_norm(cfg.num_groups, "norm")(x).astype(x.dtype).reshape(b, -1, c)
        if cfg.position_embedding:
            init = nn.initializers.normal(POSITION_STD)
            tokens += self.param("position", init, tokens.shape[1:]).astype(x.dtype)
        query = dense(c, "query")(tokens)
        pairs, masks = [], []
        if self.pixels:
            pairs.append(dense(2 * c, "key_value")(tokens))
            masks.append(jnp.ones((b, height * width), bool))
        if text is not None:
            if cfg.text_norm == "group":
                text = group_norm(TEXT_GROUPS, "text_norm")(text).astype(x.dtype)
            pairs.append(dense(2 * c, "text_key_value")(text))
            masks.append(mask)
        key, value = jnp.split(jnp.concatenate(pairs, axis=1), 2, axis=-1)
        key_mask = None if text is None else jnp.concatenate(masks, axis=1)
        out = attend(query, key, value, heads=c // cfg.head_dim, mask=key_mask)
        out = x + dense(c, "out", zero_init=True)(out).reshape(x.shape)
        return partitioning.constrain(out, ("batch", None, None, "channels"))


def attention_blocks(
    x: Float[Array, "b h w c"],
    text: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
    *,
    config: ModelConfig,
    attends: tuple[bool, ...],
    name: str,
) -> Float[Array, "b h w c"]:
    """The attention of one place in a U-Net.

    Args:
      x: pixels.
      text: text tokens as `conditioning.Conditioning` gives them.
      mask: True at real tokens.
      config: shape of the network.
      attends: whether pixels attend to pixels, and whether to text, at this place.
      name: prefix of the layers' names.
    """
    to_pixels, to_text = attends
    to_text = to_text and config.text_conditioning != "none"
    joint = to_pixels and to_text and config.text_conditioning == "concat"
    block = remat_block(AttentionBlock, config.remat)
    if to_pixels:
        attention = block(config, pixels=True, name=f"{name}_self")
        x = attention(x, *((text, mask) if joint else (None, None)))
    if to_text and not joint:
        x = block(config, pixels=False, name=f"{name}_cross")(x, text, mask)
    return x
