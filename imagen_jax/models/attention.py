"""Attention of the U-Nets: multi-head attention, its block, and the blocks of one level.

Imagen, Sec. 2.1: pixels attend to pixels and text. Rows and columns of a batch are sharded by the
logical axes "batch" and "heads" (`partitioning.RULES`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import layers
from imagen_jax.parallel import partitioning

TEXT_GROUPS = 32  # Groups of the GroupNorm on text tokens, as in IF.

POSITION_STD = 0.5  # Initial deviation of a position embedding; tokens have variance one.


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs traced within run on every platform: no kernel of one vendor is in them."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def attend(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    *,
    heads: int,
    mask: Bool[Array, "b k"] | None,
) -> Float[Array, "b q c"]:
    """Multi-head attention, softmax(q k / sqrt(head_dim)) v.

    Args:
      query: heads * head_dim channels.
      key: likewise.
      value: likewise.
      heads: number of heads.
      mask: True at keys that are attended to; None: all are.
    """

    def split(x: Array) -> Array:
        x = x.reshape(*x.shape[:2], heads, -1)
        return partitioning.constrain(x, ("batch", None, "heads", None))

    query, key, value = split(query), split(key), split(value)
    platform = "any" if _PORTABLE.get() else partitioning.platform()
    if attention_implementation(query, key, platform) == "xla":
        out = softmax_attention(query, key, value, mask)
    else:
        if mask is not None:  # cuDNN takes one row per query.
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

    Divides by the sum of the softmax after the product with the values (Dao et al. 2022, Sec. 3.1):
    fewer passes over [q, k], mostly in the gradient. If all keys are masked, weights are uniform.
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
    """cudnn where its fused attention supports the arguments, xla otherwise.

    The fused kernel never writes the [queries, keys] matrix to memory. It requires half precision,
    at most 128 channels per head in multiples of 8, and, to be differentiable under a mask, even
    numbers of queries and keys. It is not faster for a single query.

    Args:
      query: [B, Q, heads, channels].
      key: [B, K, heads, channels].
      backend: `partitioning.platform()`; "any": the program is for several.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    channels, even = query.shape[-1], query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    fits = half and even and channels <= 128 and channels % 8 == 0
    return "cudnn" if backend == "gpu" and fits else "xla"


class AttentionBlock(nn.Module):
    """Pixels attend to pixels, to text, or to both at once; residual.

    With `pixels` and text, the text keys and values are concatenated to those of the pixels, as in
    the paper's base and 64->256 models (Sec. 2.1). With text alone it is cross-attention
    (256->1024). Differs from paper if `position_embedding` is on: a learned vector per pixel is
    added to the tokens, as in a ViT (Dosovitskiy et al. 2021, Eq. 1).

    Attributes:
      config: shape of the network.
      pixels: whether pixels attend to pixels.
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
        tokens = layers.group_norm(cfg.num_groups, "norm")(x).astype(x.dtype).reshape(b, -1, c)
        if cfg.position_embedding:
            init = nn.initializers.normal(POSITION_STD)
            tokens += self.param("position", init, tokens.shape[1:]).astype(x.dtype)
        query = layers.dense(c, "query")(tokens)
        pairs, masks = [], []
        if self.pixels:
            pairs.append(layers.dense(2 * c, "key_value")(tokens))
            masks.append(jnp.ones((b, height * width), bool))
        if text is not None:
            if cfg.text_norm == "group":
                norm = layers.group_norm(TEXT_GROUPS, "text_norm", centred=True)
                text = norm(text).astype(x.dtype)
            pairs.append(layers.dense(2 * c, "text_key_value")(text))
            masks.append(mask)
        key, value = jnp.split(jnp.concatenate(pairs, axis=1), 2, axis=-1)
        key_mask = None if text is None else jnp.concatenate(masks, axis=1)
        out = attend(query, key, value, heads=c // cfg.head_dim, mask=key_mask)
        out = x + layers.dense(c, "out", zero_init=True)(out).reshape(x.shape)
        return partitioning.constrain(out, ("batch", "height", None, "channels"))


def attention_blocks(
    x: Float[Array, "b h w c"],
    text: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
    *,
    config: ModelConfig,
    attends: tuple[bool, ...],
    name: str,
) -> Float[Array, "b h w c"]:
    """The attention blocks that follow one residual block or level of a U-Net.

    Args:
      x: pixels.
      text: text tokens of `conditioning.ConditioningEmbedding`.
      mask: True at real tokens.
      config: shape of the network.
      attends: whether pixels attend to pixels, and whether they attend to text.
      name: prefix of the layers' names.
    """
    to_pixels, to_text = attends
    to_text = to_text and config.text_conditioning != "none"
    joint = to_pixels and to_text and config.text_conditioning == "concat"
    block = layers.remat_block(AttentionBlock, config.remat)
    if to_pixels:
        attention = block(config, pixels=True, name=f"{name}_self")
        x = attention(x, *((text, mask) if joint else (None, None)))
    if to_text and not joint:
        x = block(config, pixels=False, name=f"{name}_cross")(x, text, mask)
    return x
