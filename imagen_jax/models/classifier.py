"""A noise-aware classifier p(c | z, logsnr) for classifier guidance.

The encoder of `unet.UNet` without text, as in Dhariwal & Nichol 2021 (arXiv:2105.05233, Sec. 4 and
App. H), then a pooled vector and one set of logits per attribute (colour, shape, ...). Attributes
are independent given the image. `guidance.classifier` uses the gradient of `log_prob`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagen_jax.config.schema import DiffusionConfig, ModelConfig
from imagen_jax.diffusion import process as diffusion
from imagen_jax.models import attention, layers
from imagen_jax.models.conditioning import NoiseEmbedding, TextPooling


class Classifier(nn.Module):
    """Logits of several attributes of a noisy image.

    The pixels of the last level are pooled by attention, as in the paper, with the layer that pools
    text tokens in the U-Nets.

    Attributes:
      config: shape of the encoder; its text, decoder and output fields are ignored.
      classes: number of classes of each attribute.
    """

    config: ModelConfig
    classes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, z: Float[Array, "b h w c"], logsnr: Float[Array, " b"], train: bool = False
    ) -> tuple[Float[Array, "b _"], ...]:
        """The logits [B, N] of each attribute.

        Args:
          z: noisy images.
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
                    x = attention.AttentionBlock(cfg, True, name=f"attention_{i}_{j}")(
                        x, None, None
                    )
            if i < len(cfg.channels) - 1:
                block = layers.ResBlock(cfg, features, "down", name=f"down_{i}_resample")
                x = block(x, embedding, train)
        x = layers.ACTIVATIONS[cfg.activation](layers.group_norm(cfg.num_groups, "norm_out")(x))
        tokens = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        mask = jnp.ones(tokens.shape[:2], bool)
        pooled = TextPooling(cfg.channels[-1], "attention", name="pooling")(tokens, mask)
        return tuple(
            layers.dense(count, f"logits_{k}", zero_init=True)(pooled)
            for k, count in enumerate(self.classes)
        )


def log_prob(
    logits: tuple[Float[Array, "b _"], ...], labels: Int[Array, "b k"]
) -> Float[Array, " b"]:
    """log p(labels | z) in nats, summed over attributes; a label of -1 is left out of the sum."""
    total = jnp.zeros(labels.shape[0])
    for scores, label in zip(logits, labels.T, strict=True):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.maximum(label, 0)[:, None], 1)
        total += jnp.where(label < 0, 0.0, log_p[:, 0])
    return total


def loss_fn(
    params: Any,
    network: Classifier,
    x0: Float[Array, "b h w c"],
    labels: Int[Array, "b k"],
    key: Key[Array, ""],
    process: DiffusionConfig,
) -> Float[Array, ""]:
    """Mean -log p(labels | z) in nats, at timesteps uniform in [0, 1].

    Args:
      params: parameters of `network`.
      network: the classifier.
      x0: clean images in [-1, 1].
      labels: the class of each attribute; -1: unknown.
      key: PRNG key of timesteps and noise.
      process: the noise process of the guided stage.
    """
    time_key, eps_key = jax.random.split(key)
    logsnr = diffusion.logsnr_at(diffusion.stratified_timesteps(time_key, x0.shape[0]), process)
    z = diffusion.q_sample(x0, logsnr, jax.random.normal(eps_key, x0.shape))
    logits: Any = network.apply({"params": params}, z, logsnr, train=True)
    return -log_prob(logits, labels).mean()
