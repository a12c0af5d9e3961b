"""T5's encoder: tokens in, one vector per token out (Raffel et al. 2020; section 2.1 of the paper).

A pre-norm Transformer without biases whose only notion of place is a bucketed relative position
bias, computed once and added to the attention logits of every layer. `text.py` runs it frozen;
`pretrain_text.py` trains a small one. Parameter names are those of the public t5x checkpoints.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import T5Config, unknown_name

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def relative_position_bucket(
    relative: Int[np.ndarray, "q k"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "q k"]:
    """Bucket of each signed distance: exact when near, logarithmic when far.

    Args:
      relative: key position minus query position, tokens.
      num_buckets: buckets over both directions; the upper half is for keys that come later.
      max_distance: distance from which all positions share the last bucket, tokens.

    Returns:
      Buckets in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 as in the reference: a distance on a bucket's edge must fall on the same side.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(
        max_distance / exact
    )
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, in float32: no mean is subtracted and there is no bias."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * scale).astype(self.config.dtype)


class RelativeBias(nn.Module):
    """One learned number per head and bucket of distance."""

    config: T5Config

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "h l l"]:
        cfg = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("rel_embedding", init, (cfg.num_heads, cfg.relative_buckets))
        positions = np.arange(length)
        buckets = relative_position_bucket(
            positions[None, :] - positions[:, None],
            num_buckets=cfg.relative_buckets,
            max_distance=cfg.relative_max_distance,
        )
        return table[:, buckets]


class SelfAttention(nn.Module):
    """Multi-head attention over the real tokens; softmax in float32."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "b h l l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config

        def heads(name: str, init: nn.initializers.Initializer) -> Float[Array, "b l h c"]:
            y = nn.Dense(
                cfg.num_heads * cfg.head_dim,
                use_bias=False,
                dtype=cfg.dtype,
                kernel_init=init,
                name=name,
            )(x)
            return y.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)

        # T5 has no 1/sqrt(head_dim) in the logits: it is part of the query's initial scale.
        small = nn.initializers.variance_scaling(1 / cfg.head_dim, "fan_in", "truncated_normal")
        query, key, value = heads("query", small), heads("key", _FAN_IN), heads("value", _FAN_IN)
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias).astype(cfg.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(*x.shape[:2], -1)
        return nn.Dense(
            cfg.emb_dim, use_bias=False, dtype=cfg.dtype, kernel_init=_FAN_IN, name="out"
        )(mixed)


class FeedForward(nn.Module):
    """`wo(act(wi_0 x) * wi_1 x)` as in v1.1, or `wo(act(wi x))` with one activation."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        cfg = self.config
        many = len(cfg.mlp_activations) > 1
        hidden = 1.0
        for i, activation in enumerate(cfg.mlp_activations):
            if activation not in ACTIVATIONS:
                raise ValueError(unknown_name("mlp_activations", activation, list(ACTIVATIONS)))
            y = nn.Dense(
                cfg.mlp_dim,
                use_bias=False,
                dtype=cfg.dtype,
                kernel_init=_FAN_IN,
                name=f"wi_{i}" if many else "wi",
            )(x)
            hidden = hidden * ACTIVATIONS[activation](y)
        return nn.Dense(
            cfg.emb_dim, use_bias=False, dtype=cfg.dtype, kernel_init=_FAN_IN, name="wo"
        )(hidden)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "b h l l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config
        h = RMSNorm(cfg, name="pre_attention_layer_norm")(x)
        x = x + SelfAttention(cfg, name="attention")(h, bias)
        h = RMSNorm(cfg, name="pre_mlp_layer_norm")(x)
        return x + FeedForward(cfg, name="mlp")(h)


class T5Encoder(nn.Module):
    """The encoder half of T5, v1.0 (relu) or v1.1 (gated gelu) by its configuration."""

    config: T5Config

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Embeds token ids.

        Args:
          tokens: ids in [0, vocab_size); whatever stands at padding has no effect.
          mask: True at real tokens.

        Returns:
          float32 vectors of rms about 1 times the final norm's scale; zero at padding.
        """
        cfg = self.config
        x = nn.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="token_embedder",
        )(tokens)
        bias = RelativeBias(cfg, name="relpos_bias")(tokens.shape[1])[None]
        # Finite, so that a caption without any real token gives zeros rather than NaN.
        bias = jnp.where(mask[:, None, None, :], bias, -1e9)
        for i in range(cfg.num_layers):
            x = EncoderLayer(cfg, name=f"layers_{i}")(x, bias)
        x = RMSNorm(cfg, name="encoder_norm")(x)
        return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


def parameter_shapes(config: T5Config) -> dict:
    """The tree of parameter shapes (`jax.ShapeDtypeStruct`) that `config` asks for."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, mask)["params"]
