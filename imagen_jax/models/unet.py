"""The base U-Net: ADM's (Dhariwal & Nichol 2021) with text in its attention (Imagen, App. F.1).

Encoder, middle and decoder. Every output of the encoder is a skip connection; BigGAN-style residual
blocks change the resolution.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import attention, layers
from imagen_jax.models.conditioning import ConditioningEmbedding


class UNet(nn.Module):
    """Predicts eps, x0 or v of noisy images from their noise level and text.

    Attributes:
      config: shape of the network.
      DEFAULTS: values of the fields of `config` that are None.
    """

    DEFAULTS = types.MappingProxyType({"skip_scale": 1.0})

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        logsnr: Float[Array, " b"],
        text_emb: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        lowres_logsnr: Float[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w out"]:
        """The network's prediction.

        Args:
          z: noisy images; the upsampled low-resolution images of an SR stage are the last channels.
          logsnr: noise level of z, nats.
          text_emb: text embeddings; values where `text_mask` is False have no effect.
          text_mask: True at real tokens.
          lowres_logsnr: noise level of the low-resolution images, nats; None for a base stage.
          train: whether dropout is active.
        """
        cfg = self.config.with_defaults(self.DEFAULTS)
        dtype = jnp.dtype(cfg.dtype)
        embedding, text = ConditioningEmbedding(cfg, name="cond")(
            logsnr, text_emb, text_mask, lowres_logsnr
        )

        def res(x: Array, features: int, name: str, resample: str = "none") -> Array:
            block = layers.remat_block(layers.ResBlock, cfg.remat)
            return block(cfg, features, resample, name=name)(x, embedding, train)

        def attend(x: Array, attends: tuple[bool, ...], name: str) -> Array:
            return attention.attention_blocks(
                x, text, text_mask, config=cfg, attends=attends, name=f"{name}_attention"
            )

        attends = list(zip(cfg.self_attention, cfg.cross_attention, strict=True))
        last = len(cfg.channels) - 1
        skip_scale: Any = cfg.skip_scale  # A number after `with_defaults`.

        def down(i: int, x: Array) -> list[Array]:
            outputs = []
            for j in range(cfg.num_res_blocks[i]):
                x = res(x, cfg.channels[i], f"down_{i}_{j}")
                x = attend(x, attends[i], f"down_{i}_{j}")
                outputs.append(x)
            if i < last:
                outputs.append(res(x, cfg.channels[i], f"down_{i}_resample", "down"))
            return outputs

        def middle(x: Array) -> Array:
            x = res(x, cfg.channels[last], "middle_in")
            x = attend(x, cfg.middle_attention or attends[last], "middle")
            return res(x, cfg.channels[last], "middle_out")

        def up(i: int, x: Array, skips: list[Array]) -> Array:
            for j, skip in enumerate(skips):
                x = jnp.concatenate([x, skip * skip_scale], axis=-1)
                x = res(x, cfg.channels[i], f"up_{i}_{j}")
                x = attend(x, attends[i], f"up_{i}_{j}")
            return res(x, cfg.channels[i], f"up_{i}_resample", "up") if i > 0 else x

        def level(run: Callable[..., Any], *arrays: Any) -> Any:
            return layers.remat_level(lambda net, *arrays: run(*arrays), cfg.remat)(self, *arrays)

        x = layers.space_to_depth(z.astype(dtype), cfg.patch_size)
        x = layers.conv(cfg.channels[0], "conv_in")(x)

        skips = [x]
        for i in range(last + 1):
            skips += level(functools.partial(down, i), skips[-1])
        x = level(middle, skips[-1])
        for i in range(last, -1, -1):
            take = [skips.pop() for _ in range(cfg.num_res_blocks[i] + 1)]
            x = level(functools.partial(up, i), x, take)

        x = layers.ACTIVATIONS[cfg.activation](layers.group_norm(cfg.num_groups, "norm_out")(x))
        x = layers.conv(cfg.out_channels * cfg.patch_size**2, "conv_out", zero_init=True)(x)
        x = layers.depth_to_space(x, cfg.patch_size)
        return x + z[..., -cfg.out_channels :] if cfg.lowres_residual else x
