"""t5x's own network as a text encoder; needs t5x (`launch/install_t5x.sh`).

Shapes, parameter names and checkpoints are those of `models.t5`. The code is that which trained the
public weights; `models.t5` is compared with it. t5x is imported when an encoder is made.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import T5Config


@dataclasses.dataclass(frozen=True)
class T5xConfig(T5Config):
    """Shape of a T5 encoder that t5x's network computes."""


class T5xEncoder(NamedTuple):
    """t5x's Transformer, encoder half; used like a Flax module.

    Attributes:
      transformer: t5x's module.
      encode: its method.
    """

    transformer: Any
    encode: Any

    def apply(
        self, variables: Mapping[str, Any], ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """float32 vectors, zero at padding, as of `models.t5.T5Encoder`."""
        encoder = dict(variables["params"])
        params = {"token_embedder": encoder.pop("token_embedder"), "encoder": encoder}
        # For t5x padding is id 0.
        encoded = self.transformer.apply(
            {"params": params}, jnp.where(mask, ids, 0), enable_dropout=False, method=self.encode
        )
        return jnp.where(mask[..., None], encoded.astype(jnp.float32), 0.0)


def make_encoder(config: T5xConfig) -> T5xEncoder:
    """t5x's encoder of a shape.

    Raises:
      ConfigError: t5x is not installed, or its network does not support the shape.
    """
    try:
        network = importlib.import_module("t5x.examples.t5.network")
    except ImportError as error:
        raise ConfigError(
            f"config.text.encoder='t5x' needs t5x (no module {error.name!r}); run "
            "launch/install_t5x.sh, or set config.text.encoder=t5, which gives the same vectors"
        ) from None
    fixed = T5Config()
    for field in ("relative_buckets", "relative_max_distance", "norm_eps"):
        if getattr(config, field) != getattr(fixed, field):
            raise ConfigError(
                f"config.text.encoder='t5x' has {field}={getattr(fixed, field)}, the weights have "
                f"{getattr(config, field)}; set config.text.encoder=t5"
            )
    shape = network.T5Config(
        vocab_size=config.vocab_size,
        dtype=jnp.dtype(config.dtype),
        emb_dim=config.emb_dim,
        num_heads=config.num_heads,
        num_encoder_layers=config.num_layers,
        num_decoder_layers=0,
        head_dim=config.head_dim,
        mlp_dim=config.mlp_dim,
        mlp_activations=config.mlp_activations,
        dropout_rate=0.0,
    )
    return T5xEncoder(network.Transformer(shape), network.Transformer.encode)
