"""CLIP's text tower: tokens in, one vector per token out (Radford et al. 2021).

The paper's other encoder (Imagen, Sec. 2.1): the penultimate layer of ViT-L/14's text tower, that
is what the last layer but one puts out, before the last layer and the final norm, which serve the
contrastive loss. The paper does not say whether that norm applies; the picture model has a layer
norm of its own on its text (Sec. 2.5).

Both towers are the same pre-norm Transformer (`Layers`); the text tower's attention is causal, so
that padding behind a token never reaches it.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from imagen_jax.config import doc, unknown_name

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

_SMALL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Shape of a CLIP text tower; that of ViT-L/14 by default."""

    vocab_size: int = doc(49408, "Rows of the embedding table.")
    emb_dim: int = doc(768, "Width of the residual stream.")
    num_layers: int = doc(12, "Layers.")
    num_heads: int = doc(12, "Attention heads.")
    mlp_dim: int = doc(3072, "Hidden width of the feed-forward layer.")
    positions: int = doc(77, "Longest sequence, tokens.")
    activation: str = doc("quick_gelu", "quick_gelu (OpenAI's weights) or gelu (the exact form).")
    norm_eps: float = doc(1e-5, "Epsilon of the layer norm.")
    dtype: str = doc("float32", "Activation dtype.")


def _dense(features: int, name: str, dtype: str, axes: tuple[str, str]) -> nn.Dense:
    kernel_init = nn.with_logical_partitioning(_SMALL, axes)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention with biases; softmax in float32."""

    config: ClipTextConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array | np.ndarray, "l l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config

        def heads(name: str) -> Float[Array, "b l h c"]:
            y = _dense(cfg.emb_dim, name, cfg.dtype, ("embed", "mlp"))(x)
            return y.reshape(*x.shape[:2], cfg.num_heads, cfg.emb_dim // cfg.num_heads)

        query, key, value = heads("query"), heads("key"), heads("value")
        query *= query.shape[-1] ** -0.5
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e9)).astype(cfg.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(x.shape)
        return _dense(cfg.emb_dim, "out", cfg.dtype, ("mlp", "embed"))(mixed)


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    config: ClipTextConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array | np.ndarray, "l l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config
        if cfg.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", cfg.activation, list(ACTIVATIONS)))
        x = x + SelfAttention(cfg, name="attention")(layer_norm(cfg, "norm_1")(x), mask)
        h = _dense(cfg.mlp_dim, "up", cfg.dtype, ("embed", "mlp"))(layer_norm(cfg, "norm_2")(x))
        h = ACTIVATIONS[cfg.activation](h)
        return x + _dense(cfg.emb_dim, "down", cfg.dtype, ("mlp", "embed"))(h)


def layer_norm(config: ClipTextConfig, name: str) -> nn.LayerNorm:
    """LayerNorm; Flax keeps its statistics in float32."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.dtype, name=name)


class TextTower(nn.Module):
    """The text half of CLIP."""

    config: ClipTextConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Embeds token ids.

        Args:
          tokens: ids in [0, vocab_size), from the start mark to the end mark; whatever stands at
            padding has no effect.
          mask: True at real tokens.

        Returns:
          float32 vectors of the last layer but one, not normed; zero at padding.
        """
        cfg, length = self.config, tokens.shape[1]
        if length > cfg.positions:
            raise ValueError(f"{length} tokens, but the tower has {cfg.positions} positions")
        table_init = nn.with_logical_partitioning(_SMALL, ("vocab", "embed"))
        x = nn.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            embedding_init=table_init,
            name="token_embedder",
        )(tokens)
        places = self.param("position_embedder", _SMALL, (cfg.positions, cfg.emb_dim))
        x = x + places[:length].astype(cfg.dtype)
        causal = np.tri(length, dtype=bool)
        for i in range(cfg.num_layers - 1):
            x = Layer(cfg, name=f"layers_{i}")(x, causal)
        return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


def init_params(config: ClipTextConfig, key: Key[Array, ""]) -> dict:
    """Fresh float32 parameters, each boxed with its logical axis names."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return TextTower(config).init(key, ids, ids == 0)["params"]


def boxed_shapes(config: ClipTextConfig) -> dict:
    """Shapes (`jax.ShapeDtypeStruct`) boxed with their axis names, for `param_shardings`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def flops(config: ClipTextConfig, length: int) -> float:
    """Floating-point operations (two per multiply-add) of one caption padded to `length` tokens."""
    kernels = 4 * config.emb_dim**2 + 2 * config.emb_dim * config.mlp_dim
    attention = 2 * length * config.emb_dim
    return 2.0 * (config.num_layers - 1) * length * (kernels + attention)
