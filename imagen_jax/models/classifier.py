"""A noise-aware classifier, p(c | z, logsnr): the guide of classifier guidance.

Half a U-Net, as in Dhariwal & Nichol 2021 (arXiv:2105.05233, Sec. 4 and App. H): the encoder of
`unet.UNet` without text, then a pooled vector and one set of logits for each thing that is asked
(colour, shape, ...), which are taken as independent given the picture. `guidance.classifier` turns
the gradient of its `log_prob` into guidance.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagen_jax.config.schema import DiffusionConfig, ModelConfig
from imagen_jax.diffusion import process as diffusion
from imagen_jax.models import layers
from imagen_jax.models.conditioning import NoiseEmbedding, TextPooling


class Classifier(nn.Module):
    """Logits of several classifications of one noisy picture.

    The pixels of the last level are pooled by attention, as in the paper, by the very layer that
    pools text tokens elsewhere.

    Attributes:
      config: shape of the encoder; its fields of text, decoder and output are not looked at.
      classes: number of classes of each classification.
    """

    config: ModelConfig
    classes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, z: Float[Array, "b h w c"], logsnr: Float[Array, " b"], train: bool = False
    ) -> tuple[Float[Array, "b _"], ...]:
        """The logits [B, N] of each classification.

        Args:
          z: noisy pictures.
          logsnr: their noise level, nats.
          train: whether dropout is active.
        """
        cfg = self.config
        embedding = NoiseEmbedding(cfg, cfg.embed_dim or 4 * cfg.channels[0], name="noise")(logsnr)
        embedding = embedding.astype(cfg.dtype)
        x = layers.space_to_depth(z.astype(cfg.dtype), cfg.patch_size)
        x = layers.conv(cfg.channels[0], "conv_in")(x)
        for i, features in enumerate(cfg.channels):
            for j in range(cfg.num_res_blocks[i]):
                x = layers.ResBlock(cfg, features, name=f"down_{i}_{j}")(x, embedding, train)
                if cfg.self_attention[i]:
                    x = layers.AttentionBlock(cfg, True, name=f"attention_{i}_{j}")(x, None, None)
            if i < len(cfg.channels) - 1:
                block = layers.ResBlock(cfg, features, "down", name=f"down_{i}_resample")
                x = block(x, embedding, train)
        x = layers.ACTIVATIONS[cfg.activation](layers.group_norm(cfg.num_groups, "norm_out")(x))
        tokens = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        everywhere = jnp.ones(tokens.shape[:2], bool)
        pooled = TextPooling(cfg.channels[-1], "attention", name="pooling")(tokens, everywhere)
        return tuple(
            layers.dense(count, f"logits_{k}", zero_init=True)(pooled)
            for k, count in enumerate(self.classes)
        )


def log_prob(
    logits: tuple[Float[Array, "b _"], ...], labels: Int[Array, "b k"]
) -> Float[Array, " b"]:
    """log p(labels | z) in nats: the sum over those that are asked; -1: this one is not."""
    total = jnp.zeros(labels.shape[0])
    for one, label in zip(logits, labels.T, strict=True):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(one), jnp.maximum(label, 0)[:, None], 1)
        total += jnp.where(label < 0, 0.0, chosen[:, 0])
    return total


def loss_fn(
    params: Any,
    network: Classifier,
    x0: Float[Array, "b h w c"],
    labels: Int[Array, "b k"],
    key: Key[Array, ""],
    process: DiffusionConfig,
) -> Float[Array, ""]:
    """Mean -log p(labels | z) in nats, z at a uniform time of the process of the guided stage.

    Args:
      params: of the network.
      network: the classifier.
      x0: clean pictures in [-1, 1].
      labels: the class of each classification; -1: unknown.
      key: of time and noise.
      process: what the guided stage learned from.
    """
    time_key, eps_key = jax.random.split(key)
    logsnr = diffusion.logsnr_at(diffusion.stratified_timesteps(time_key, x0.shape[0]), process)
    z = diffusion.q_sample(x0, logsnr, jax.random.normal(eps_key, x0.shape))
    logits: Any = network.apply({"params": params}, z, logsnr, train=True)
    return -log_prob(logits, labels).mean()
