"""T5's encoder: one vector per token (Raffel et al. 2020; Imagen, Sec. 2.1).

A pre-norm Transformer without biases. Positions enter only by a bucketed relative position bias,
computed once and added to the attention logits of every layer. `text.encoders` runs it frozen;
`training.pretrain_text` trains a small one. Parameter names are those of the public t5x
checkpoints; each kernel names its logical axes for `partitioning.RULES`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from imagen_jax.config.fields import unknown_name
from imagen_jax.config.text import T5Config

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _v1_1(emb_dim: int, mlp_dim: int, layers: int, heads: int, vocab_size: int = 32128) -> T5Config:
    """T5 v1.1 and models of its form: gated gelu, 64 channels per head."""
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_layers=layers,
        num_heads=heads,
        head_dim=64,
        mlp_dim=mlp_dim,
    )


def _v1_0(emb_dim: int, mlp_dim: int, layers: int, heads: int, head_dim: int = 64) -> T5Config:
    """T5 v1.0: relu."""
    return T5Config(
        emb_dim=emb_dim,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        mlp_activations=("relu",),
    )


# Shapes of the public encoders (`config.text.preset`); the user downloads the weights. Imagen uses
# t5_v1_1_xxl.
T5_PRESETS: dict[str, T5Config] = {
    "t5_v1_1_small": _v1_1(512, 1024, layers=8, heads=6),
    "t5_v1_1_base": _v1_1(768, 2048, layers=12, heads=12),
    "t5_v1_1_large": _v1_1(1024, 2816, layers=24, heads=16),
    "t5_v1_1_xl": _v1_1(2048, 5120, layers=24, heads=32),
    "t5_v1_1_xxl": _v1_1(4096, 10240, layers=24, heads=64),
    "flan_t5_small": _v1_1(512, 1024, layers=8, heads=6),
    "flan_t5_base": _v1_1(768, 2048, layers=12, heads=12),
    "flan_t5_large": _v1_1(1024, 2816, layers=24, heads=16),
    "flan_t5_xl": _v1_1(2048, 5120, layers=24, heads=32),
    "flan_t5_xxl": _v1_1(4096, 10240, layers=24, heads=64),
    "t5_small": _v1_0(512, 2048, layers=6, heads=8),
    "t5_base": _v1_0(768, 3072, layers=12, heads=12),
    "t5_large": _v1_0(1024, 4096, layers=24, heads=16),
    "t5_3b": _v1_0(1024, 16384, layers=24, heads=32, head_dim=128),
    "t5_11b": _v1_0(1024, 65536, layers=24, heads=128, head_dim=128),
    "byt5_small": _v1_1(1472, 3584, layers=12, heads=6, vocab_size=384),
    "byt5_base": _v1_1(1536, 3968, layers=18, heads=12, vocab_size=384),
    "byt5_large": _v1_1(1536, 3840, layers=36, heads=16, vocab_size=384),
    "byt5_xl": _v1_1(2560, 6720, layers=36, heads=32, vocab_size=384),
    "byt5_xxl": _v1_1(4672, 12352, layers=36, heads=64, vocab_size=384),
}


def relative_position_bucket(
    relative: Int[np.ndarray, "q k"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "q k"]:
    """Bucket of each signed distance: exact for small, logarithmic for large distances.

    Args:
      relative: key position minus query position, tokens.
      num_buckets: buckets of both directions; the upper half is for keys after the query.
      max_distance: distance from which all positions share the last bucket, tokens.

    Returns:
      Buckets in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 as in the reference, for equal rounding at the edges of buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(
        max_distance / exact
    )
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


def _dense(
    features: int,
    name: str,
    config: T5Config,
    axes: tuple[str, str],
    init: nn.initializers.Initializer = _FAN_IN,
) -> nn.Dense:
    """Linear layer without bias; `axes` are the logical axes of its kernel."""
    kernel_init = nn.with_logical_partitioning(init, axes)
    return nn.Dense(
        features, use_bias=False, dtype=config.dtype, kernel_init=kernel_init, name=name
    )


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` in float32, without mean and bias."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * scale).astype(self.config.dtype)


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distance."""

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
            y = _dense(cfg.num_heads * cfg.head_dim, name, cfg, ("embed", "mlp"), init)(x)
            return y.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)

        # T5 has no 1/sqrt(head_dim) in the logits; the query's initial scale includes it.
        small = nn.initializers.variance_scaling(1 / cfg.head_dim, "fan_in", "truncated_normal")
        query, key, value = heads("query", small), heads("key", _FAN_IN), heads("value", _FAN_IN)
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias).astype(cfg.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(*x.shape[:2], -1)
        return _dense(cfg.emb_dim, "out", cfg, ("mlp", "embed"))(mixed)


class FeedForward(nn.Module):
    """`wo(act(wi_0 x) * wi_1 x)` as in v1.1, or `wo(act(wi x))` with one activation."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        cfg = self.config
        gated = len(cfg.mlp_activations) > 1
        hidden = 1.0
        for i, activation in enumerate(cfg.mlp_activations):
            if activation not in ACTIVATIONS:
                raise ValueError(unknown_name("mlp_activations", activation, list(ACTIVATIONS)))
            y = _dense(cfg.mlp_dim, f"wi_{i}" if gated else "wi", cfg, ("embed", "mlp"))(x)
            hidden = hidden * ACTIVATIONS[activation](y)
        return _dense(cfg.emb_dim, "wo", cfg, ("mlp", "embed"))(hidden)


class EncoderLayer(nn.Module):
    """Pre-norm residual attention and feed-forward."""

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
    """The encoder of T5, v1.0 (relu) or v1.1 (gated gelu) by its configuration."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b l"],
        mask: Bool[Array | np.ndarray, "b l"],
        *,
        keep_padding: bool = False,
    ) -> Float[Array, "b l d"]:
        """Embeds token ids.

        Args:
          tokens: ids in [0, vocab_size); ids at padding have no effect on the vectors elsewhere.
          mask: True at real tokens.
          keep_padding: return the vectors at padding, too.

        Returns:
          float32 vectors of rms about 1 times the final norm's scale; zero at padding.
        """
        cfg = self.config
        x = nn.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("vocab", "embed")
            ),
            name="token_embedder",
        )(tokens)
        bias = RelativeBias(cfg, name="relpos_bias")(tokens.shape[1])[None]
        # Finite, so that a caption without real tokens gives zeros and not NaN.
        bias = jnp.where(mask[:, None, None, :], bias, -1e9)
        for i in range(cfg.num_layers):
            x = EncoderLayer(cfg, name=f"layers_{i}")(x, bias)
        x = RMSNorm(cfg, name="encoder_norm")(x)
        x = x.astype(jnp.float32)
        return x if keep_padding else jnp.where(mask[..., None], x, 0.0)


def init_params(config: T5Config, key: Key[Array, ""]) -> Any:
    """Random float32 parameters, each boxed with its logical axis names."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return T5Encoder(config).init(key, ids, ids == 0)["params"]


def boxed_shapes(config: T5Config) -> dict:
    """Shapes (`jax.ShapeDtypeStruct`) boxed with their axis names, for `param_shardings`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def parameter_shapes(config: T5Config) -> dict:
    """The tree of parameter shapes (`jax.ShapeDtypeStruct`) of `config`."""
    return nn.meta.unbox(boxed_shapes(config))


def flops(config: T5Config, length: int) -> float:
    """Floating-point operations (two per multiply-add) of one caption padded to `length` tokens."""
    inner = config.num_heads * config.head_dim
    kernels = 4 * config.emb_dim * inner
    kernels += (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
    attention = 2 * length * inner
    return 2.0 * config.num_layers * length * (kernels + attention)
