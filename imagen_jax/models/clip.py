"""CLIP's two towers (Radford et al. 2021): a text encoder of the paper, and the CLIP score.

Text encoder (Imagen, Sec. 2.1): `TextTower` gives the output of the penultimate layer of
ViT-L/14's text tower, without the last layer and the final norm. Paper is silent on the final norm;
the U-Nets apply a LayerNorm to their text (Sec. 2.5).

CLIP score (`evaluation.features.clip_score`): `TextEmbedding` and `ImageEmbedding` map captions and
images to one space; the score is their cosine.

Both towers are the same pre-norm Transformer (`Layer`). The attention of the text tower is causal,
so padding does not affect the tokens before it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from imagen_jax.config.fields import doc, unknown_name

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

_SMALL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Shape of a CLIP text tower, by default that of ViT-L/14."""

    vocab_size: int = doc(49408, "Rows of the embedding table.")
    emb_dim: int = doc(768, "Width of the residual stream.")
    num_layers: int = doc(12, "Layers.")
    num_heads: int = doc(12, "Attention heads.")
    mlp_dim: int = doc(3072, "Hidden width of the feed-forward layer.")
    positions: int = doc(77, "Longest sequence, tokens.")
    activation: str = doc("quick_gelu", "quick_gelu (OpenAI's weights) or gelu (the exact form).")
    norm_eps: float = doc(1e-5, "Epsilon of the layer norm.")
    dtype: str = doc("float32", "Activation dtype.")


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Shape of a CLIP image tower, by default that of ViT-L/14."""

    image_size: int = doc(224, "Side of an image, pixels.")
    patch_size: int = doc(14, "Side of a patch, pixels.")
    emb_dim: int = doc(1024, "Width of the residual stream.")
    num_layers: int = doc(24, "Layers.")
    num_heads: int = doc(16, "Attention heads.")
    mlp_dim: int = doc(4096, "Hidden width of the feed-forward layer.")
    activation: str = doc("quick_gelu", "quick_gelu (OpenAI's weights) or gelu (the exact form).")
    norm_eps: float = doc(1e-5, "Epsilon of the layer norm.")
    dtype: str = doc("float32", "Activation dtype.")


TowerConfig = ClipTextConfig | ClipVisionConfig


def dense(features: int, name: str, dtype: str, axes: tuple[str, str]) -> nn.Dense:
    """A linear map with bias; `axes` are the logical axes of its kernel."""
    kernel_init = nn.with_logical_partitioning(_SMALL, axes)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention with biases; softmax in float32."""

    config: TowerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array | np.ndarray, "*#bh #l l"]
    ) -> Float[Array, "b l d"]:
        """Attends to the keys where `mask`, broadcast to [b, heads, queries, keys], is True."""
        cfg = self.config

        def heads(name: str) -> Float[Array, "b l h c"]:
            y = dense(cfg.emb_dim, name, cfg.dtype, ("embed", "mlp"))(x)
            return y.reshape(*x.shape[:2], cfg.num_heads, cfg.emb_dim // cfg.num_heads)

        query, key, value = heads("query"), heads("key"), heads("value")
        query *= query.shape[-1] ** -0.5
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e9)).astype(cfg.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(x.shape)
        return dense(cfg.emb_dim, "out", cfg.dtype, ("mlp", "embed"))(mixed)


class Layer(nn.Module):
    """Pre-norm residual attention and feed-forward.

    Attributes:
      config: shape of the tower.
      branch_scale: whether a learned factor per channel scales each residual branch (DINOv2's
        LayerScale, arXiv:2103.17239).
    """

    config: TowerConfig
    branch_scale: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array | np.ndarray, "l l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config
        if cfg.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", cfg.activation, list(ACTIVATIONS)))

        def scaled(y: Float[Array, "b l d"], name: str) -> Float[Array, "b l d"]:
            if not self.branch_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (cfg.emb_dim,))

        h = SelfAttention(cfg, name="attention")(layer_norm(cfg, "norm_1")(x), mask)
        x = x + scaled(h, "scale_1")
        h = dense(cfg.mlp_dim, "up", cfg.dtype, ("embed", "mlp"))(layer_norm(cfg, "norm_2")(x))
        h = ACTIVATIONS[cfg.activation](h)
        return x + scaled(dense(cfg.emb_dim, "down", cfg.dtype, ("mlp", "embed"))(h), "scale_2")


def layer_norm(config: TowerConfig, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.dtype, name=name)


def _text_layers(
    tower: TextTower | TextEmbedding, tokens: Int[Array | np.ndarray, "b l"], count: int
) -> Float[Array, "b l d"]:
    """Output of the first `count` layers; the parameters belong to `tower`."""
    cfg, length = tower.config, tokens.shape[1]
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
    positions = tower.param("position_embedder", _SMALL, (cfg.positions, cfg.emb_dim))
    x = x + positions[:length].astype(cfg.dtype)
    causal = np.tri(length, dtype=bool)
    for i in range(count):
        x = Layer(cfg, name=f"layers_{i}")(x, causal)
    return x


class TextTower(nn.Module):
    """CLIP's text tower up to the penultimate layer."""

    config: ClipTextConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Embeds token ids.

        Args:
          tokens: ids in [0, vocab_size), from the start token to the end token; ids at padding have
            no effect.
          mask: True at real tokens.

        Returns:
          float32 outputs of the penultimate layer, without final norm; zero at padding.
        """
        x = _text_layers(self, tokens, self.config.num_layers - 1)
        return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


class TextEmbedding(nn.Module):
    """A caption as one vector: all layers, final norm, projection of the end token."""

    config: ClipTextConfig
    projection_dim: int

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b d"]:
        """Embeds captions, from the start token to the end token; not normalised."""
        x = _text_layers(self, tokens, self.config.num_layers)
        end = x[jnp.arange(len(x)), mask.sum(1) - 1]
        end = layer_norm(self.config, "final_norm")(end)
        return _projection(self.projection_dim, self.config.dtype)(end).astype(jnp.float32)


class ImageEmbedding(nn.Module):
    """An image as one vector: the projected output of a class token beside the patches."""

    config: ClipVisionConfig
    projection_dim: int

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b s s 3"]) -> Float[Array, "b d"]:
        """Embeds standardised images of side `image_size`; the result is not normalised."""
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(
            cfg.emb_dim,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=cfg.dtype,
            name="patch_embedder",
        )(images)
        x = x.reshape(len(x), -1, cfg.emb_dim)
        class_token = self.param("class_embedder", _SMALL, (cfg.emb_dim,)).astype(cfg.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, cfg.emb_dim)), x], 1)
        positions = self.param("position_embedder", _SMALL, (x.shape[1], cfg.emb_dim))
        x = layer_norm(cfg, "first_norm")(x + positions.astype(cfg.dtype))
        mask = np.ones((x.shape[1], x.shape[1]), bool)
        for i in range(cfg.num_layers):
            x = Layer(cfg, name=f"layers_{i}")(x, mask)
        pooled = layer_norm(cfg, "final_norm")(x[:, 0])
        return _projection(self.projection_dim, cfg.dtype)(pooled).astype(jnp.float32)


def _projection(features: int, dtype: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, name="projection")


def init_params(config: ClipTextConfig, key: Key[Array, ""]) -> Any:
    """Random float32 parameters, each boxed with its logical axis names."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return TextTower(config).init(key, ids, ids == 0)["params"]


def boxed_shapes(config: ClipTextConfig) -> dict:
    """Shapes (`jax.ShapeDtypeStruct`) boxed with their axis names, for `param_shardings`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def block_flops(config: ClipTextConfig, length: int) -> float:
    """Floating-point operations (two per multiply-add) of one block on `length` tokens."""
    kernels = 4 * config.emb_dim**2 + 2 * config.emb_dim * config.mlp_dim
    return 2.0 * length * (kernels + 2 * length * config.emb_dim)


def flops(config: ClipTextConfig, length: int) -> float:
    """Floating-point operations of one caption padded to `length` tokens, the last block unused."""
    return (config.num_layers - 1) * block_flops(config, length)
