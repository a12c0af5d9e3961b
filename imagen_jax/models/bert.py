"""BERT's encoder (Devlin et al. 2019, arXiv:1810.04805): a text encoder (Imagen, Sec. 2.1).

The paper compares T5, BERT and CLIP as frozen text encoders. Attention is bidirectional and the
norms follow the residual sums. Positions are learned and absolute. Every token has type 0.
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
from imagen_jax.models.clip import ClipTextConfig, SelfAttention, block_flops, dense, layer_norm

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}

_SMALL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BertConfig(ClipTextConfig):
    """Shape of a BERT, by default that of BERT base: the fields of a CLIP text tower, and types."""

    vocab_size: int = doc(30522, "Rows of the embedding table.")
    num_layers: int = doc(12, "Layers that are run; 0: the embeddings are the result.")
    positions: int = doc(512, "Longest sequence, tokens.")
    token_types: int = doc(2, "Rows of the table of token types; row 0 is used.")
    activation: str = doc("gelu", "gelu (the exact form), gelu_new (the tanh form) or relu.")
    norm_eps: float = doc(1e-12, "Epsilon of the layer norm.")


class Layer(nn.Module):
    """Residual attention and feed-forward, each followed by a layer norm."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array | np.ndarray, "b 1 1 l"]
    ) -> Float[Array, "b l d"]:
        cfg = self.config
        if cfg.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", cfg.activation, list(ACTIVATIONS)))
        h = SelfAttention(cfg, name="attention")(x, mask)
        x = layer_norm(cfg, "norm_1")(x + h)
        h = dense(cfg.mlp_dim, "up", cfg.dtype, ("embed", "mlp"))(x)
        h = ACTIVATIONS[cfg.activation](h)
        h = dense(cfg.emb_dim, "down", cfg.dtype, ("mlp", "embed"))(h)
        return layer_norm(cfg, "norm_2")(x + h)


class BertEncoder(nn.Module):
    """The first `num_layers` layers of a BERT."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Embeds token ids.

        Args:
          tokens: ids in [0, vocab_size), from [CLS] to [SEP]; ids at padding have no effect.
          mask: True at real tokens.

        Returns:
          float32 output of the last layer that is run; zero at padding.
        """
        cfg, length = self.config, tokens.shape[1]
        if length > cfg.positions:
            raise ValueError(f"{length} tokens, but the encoder has {cfg.positions} positions")
        x = nn.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            embedding_init=nn.with_logical_partitioning(_SMALL, ("vocab", "embed")),
            name="token_embedder",
        )(tokens)
        positions = self.param("position_embedder", _SMALL, (cfg.positions, cfg.emb_dim))
        types = self.param("type_embedder", _SMALL, (cfg.token_types, cfg.emb_dim))
        x = x + (positions[:length] + types[0]).astype(cfg.dtype)
        x = layer_norm(cfg, "first_norm")(x)
        for i in range(cfg.num_layers):
            x = Layer(cfg, name=f"layers_{i}")(x, mask[:, None, None, :])
        return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


def init_params(config: BertConfig, key: Key[Array, ""]) -> Any:
    """Random float32 parameters, each boxed with its logical axis names."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return BertEncoder(config).init(key, ids, ids == 0)["params"]


def boxed_shapes(config: BertConfig) -> dict:
    """Shapes (`jax.ShapeDtypeStruct`) boxed with their axis names, for `param_shardings`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def flops(config: BertConfig, length: int) -> float:
    """Floating-point operations of one caption padded to `length` tokens, every block counted."""
    return config.num_layers * block_flops(config, length)
