"""Building blocks shared by the U-Nets: convolutions, norms, attention, text conditioning.

Every kernel names its logical axes, so that `partitioning` can lay it over a mesh by one table of
rules. Parameters are float32; activations have the dtype of the input; norms compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _input_dtype(x: Array, *params: Array | None, dtype: None = None) -> list[Array | None]:
    """Casts float32 parameters to the input; Flax's own rule would widen the input instead."""
    del dtype
    return [x, *(None if p is None else p.astype(x.dtype) for p in params)]


def remat_block(block: type[nn.Module], policy: str, train_argument: int = 0) -> type[nn.Module]:
    """`block`, whose inside the backward pass computes again if `model.remat` asks for it.

    Args:
      block: a residual or attention block.
      policy: `model.remat`.
      train_argument: position of the argument `train`, self included, which is no array; 0: none.
    """
    if policy == "none":
        return block
    return nn.remat(block, static_argnums=(train_argument,) if train_argument else ())


def remat_level(level: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`level(module, *arrays)`, computed again in the backward pass if `model.remat` is full."""
    return nn.remat(level) if policy == "full" else level


def dense(features: int, name: str, *, zero_init: bool = False) -> nn.Dense:
    """Linear layer over the last axis."""
    init = nn.initializers.zeros if zero_init else _FAN_IN
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")),
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


def group_norm(num_groups: int, name: str) -> nn.GroupNorm:
    """GroupNorm with float32 statistics."""
    return nn.GroupNorm(num_groups, epsilon=1e-5, dtype=jnp.float32, name=name)


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


def sinusoidal(position: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Sines and cosines of `position` at wavelengths 2 pi .. 2 pi 10^4 (Vaswani et al. 2017)."""
    frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(dim // 2) / (dim // 2))
    angle = position[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class NoiseEmbedding(nn.Module):
    """Embeds logsnr [B] as [B, dim].

    logsnr is first mapped to the cosine schedule's time, u = 2/pi atan(exp(-logsnr/2)) in [0, 1],
    in which all levels are spread evenly, and scaled to 0..30: the shortest wavelength is then a
    fifth of that range. (ADM's 0..1000 makes half of the features noise in a continuous time.)
    Paper is silent on this.
    """

    dim: int

    @nn.compact
    def __call__(self, logsnr: Float[Array, " b"]) -> Float[Array, "b dim"]:
        u = jnp.arctan(jnp.exp(-0.5 * logsnr)) * (2.0 / jnp.pi)
        x = sinusoidal(30.0 * u, min(self.dim, 256))
        x = dense(self.dim, "hidden")(x)
        return dense(self.dim, "out")(nn.swish(x))


class TextPooling(nn.Module):
    """Pools text tokens [B, L, D] into one vector [B, dim] (Imagen, Sec. 2.5 and D.3.1).

    attention: the masked mean of the tokens queries the tokens, several heads of 64 channels.
    mean: the masked mean alone, through one linear layer (the paper's weaker option).
    Paper is silent on heads and query.
    """

    dim: int
    mode: str

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l d"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b dim"]:
        weight = mask[..., None].astype(text.dtype)
        mean = (text * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        if self.mode == "mean":
            return dense(self.dim, "out")(mean)
        heads = max(1, self.dim // 64)
        query = dense(self.dim, "query")(mean)[:, None]
        key, value = jnp.split(dense(2 * self.dim, "key_value")(text), 2, axis=-1)
        pooled = attend(query, key, value, heads=heads, mask=mask)
        return dense(self.dim, "out")(pooled[:, 0])


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
        return x.reshape(*x.shape[:2], heads, -1)

    attention_mask = None if mask is None else mask[:, None, None, :]
    out = jax.nn.dot_product_attention(split(query), split(key), split(value), mask=attention_mask)
    return out.reshape(query.shape)


class ResBlock(nn.Module):
    """GroupNorm, swish, conv, GroupNorm with scale and shift from the embedding, swish, conv.

    The residual block of ADM (BigGAN-style: `resample` happens inside, on both branches) and of the
    Efficient U-Net (Fig. A.27), whose shortcut is always a 1x1 convolution.
    """

    features: int
    num_groups: int
    dropout: float = 0.0
    resample: str = "none"
    always_project: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], train: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        resample = {"none": lambda v: v, "down": downsample, "up": upsample}[self.resample]
        h = nn.swish(group_norm(self.num_groups, "norm_in")(x)).astype(x.dtype)
        h = conv(self.features, "conv_in")(resample(h))
        modulation = dense(2 * self.features, "modulation")(nn.swish(embedding))
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        h = group_norm(self.num_groups, "norm_out")(h) * (1.0 + scale) + shift
        h = nn.swish(h).astype(x.dtype)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv(self.features, "conv_out", zero_init=True)(h)
        x = resample(x)
        if self.always_project or x.shape[-1] != self.features:
            x = conv(self.features, "shortcut", kernel=1)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Pixels attend to pixels, to text, or to both at once; residual.

    With `pixels` and text given, text keys/values are concatenated to the pixels' own, as the paper
    does in the base and 64->256 models (Sec. 2.1); with text alone it is cross-attention
    (256->1024).
    """

    head_dim: int
    num_groups: int
    pixels: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "b l d"] | None,
        mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        tokens = group_norm(self.num_groups, "norm")(x).astype(x.dtype).reshape(b, -1, c)
        query = dense(c, "query")(tokens)
        pairs, masks = [], []
        if self.pixels:
            pairs.append(dense(2 * c, "key_value")(tokens))
            masks.append(jnp.ones((b, height * width), bool))
        if text is not None:
            pairs.append(dense(2 * c, "text_key_value")(text))
            masks.append(mask)
        key, value = jnp.split(jnp.concatenate(pairs, axis=1), 2, axis=-1)
        key_mask = None if text is None else jnp.concatenate(masks, axis=1)
        out = attend(query, key, value, heads=c // self.head_dim, mask=key_mask)
        return x + dense(c, "out", zero_init=True)(out).reshape(x.shape)


class Conditioning(nn.Module):
    """The embedding [B, dim] of noise level, pooled text and low-res noise level; normed tokens.

    LayerNorm on the text embeddings, before attention and before pooling, is a considerable gain
    (Imagen, D.3.1).
    """

    dim: int
    text_pooling: str
    dtype: str

    @nn.compact
    def __call__(
        self,
        logsnr: Float[Array, " b"],
        text_emb: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        lowres_logsnr: Float[Array, " b"] | None,
    ) -> tuple[Float[Array, "b dim"], Float[Array, "b l d"]]:
        text = nn.LayerNorm(name="text_norm")(text_emb.astype(jnp.float32)).astype(self.dtype)
        pooled_input = nn.LayerNorm(name="pooling_norm")(text_emb.astype(jnp.float32))
        embedding = NoiseEmbedding(self.dim, name="noise")(logsnr)
        embedding += TextPooling(self.dim, self.text_pooling, name="pooling")(
            pooled_input, text_mask
        )
        if lowres_logsnr is not None:
            embedding += NoiseEmbedding(self.dim, name="lowres_noise")(lowres_logsnr)
        return embedding.astype(self.dtype), text


def attention_blocks(
    x: Float[Array, "b h w c"],
    text: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
    *,
    settings: tuple[bool, bool, str],
    head_dim: int,
    num_groups: int,
    remat: str,
    name: str,
) -> Float[Array, "b h w c"]:
    """The attention of one place in a U-Net.

    Args:
      x: pixels.
      text: normed text tokens.
      mask: True at real tokens.
      settings: (self_attention, cross_attention, text_conditioning) of the level.
      head_dim: channels per head.
      num_groups: groups of the norm.
      remat: `model.remat`.
      name: prefix of the layers' names.
    """
    self_attention, cross_attention, mode = settings
    if mode == "none":
        cross_attention = False
    joint = self_attention and cross_attention and mode == "concat"
    block = remat_block(AttentionBlock, remat)
    if self_attention:
        attention = block(head_dim, num_groups, pixels=True, name=f"{name}_self")
        x = attention(x, *((text, mask) if joint else (None, None)))
    if cross_attention and not joint:
        x = block(head_dim, num_groups, pixels=False, name=f"{name}_cross")(x, text, mask)
    return x
