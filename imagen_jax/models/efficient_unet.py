"""The Efficient U-Net of the super-resolution stages (Imagen, App. B and F.2, Fig. A.27-A.30).

Each level downsamples before its convolutions and upsamples after them, so most parameters act at
low resolution. One skip per level, scaled by 1/sqrt(2) and added; no middle block.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import attention, layers
from imagen_jax.models.conditioning import ConditioningEmbedding


class EfficientUNet(nn.Module):
    """Predicts eps, x0 or v of noisy images from noise level, text and low-resolution images.

    Attributes:
      config: shape of the network.
      DEFAULTS: values of the fields of `config` that are None.
    """

    DEFAULTS = types.MappingProxyType({"skip_scale": 2**-0.5})  # App. B

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
        """The network's prediction; arguments as in `unet.UNet`."""
        cfg = self.config.with_defaults(self.DEFAULTS)
        dtype = jnp.dtype(cfg.dtype)
        embedding, text = ConditioningEmbedding(cfg, name="cond")(
            logsnr, text_emb, text_mask, lowres_logsnr
        )
        strided = cfg.strided_stem or (True,) * len(cfg.channels)

        def blocks(x: Array, level: int, name: str) -> Array:
            # The figures show one CombineEmbs before the blocks; the configuration in App. F.2 sets
            # scale-shift norm. Here the embedding modulates the norm of every block.
            block = layers.remat_block(layers.ResBlock, cfg.remat)
            for j in range(cfg.num_res_blocks[level]):
                layer = block(
                    cfg, cfg.channels[level], always_project=True, name=f"{name}_{level}_{j}"
                )
                x = layer(x, embedding, train)
            return attention.attention_blocks(
                x,
                text,
                text_mask,
                config=cfg,
                attends=(cfg.self_attention[level], cfg.cross_attention[level]),
                name=f"{name}_{level}_attention",
            )

        def down(i: int, x: Array) -> Array:
            width, stride = cfg.channels[i], 2 if strided[i] else 1
            if stride == 2 or x.shape[-1] != width:
                x = layers.conv(width, f"down_{i}_conv", stride=stride)(x)
            return blocks(x, i, "down")

        def up(i: int, x: Array) -> Array:
            x = blocks(x, i, "up")
            width = cfg.channels[max(i - 1, 0)]
            if strided[i]:
                x = layers.upsample(x)
            if strided[i] or x.shape[-1] != width:
                x = layers.conv(width, f"up_{i}_conv")(x)
            return x

        def level(run: Callable[[int, Array], Array], i: int, x: Array) -> Array:
            return layers.remat_level(lambda net, x: run(i, x), cfg.remat)(self, x)

        x = layers.space_to_depth(z.astype(dtype), cfg.patch_size)
        x = layers.conv(cfg.channels[0], "conv_in")(x)

        last = len(cfg.channels) - 1
        skips = []
        for i in range(last + 1):
            x = level(down, i, x)
            skips.append(x)
        for i in range(last, -1, -1):
            x = x if i == last else x + skips[i] * cfg.skip_scale
            x = level(up, i, x)

        x = layers.ACTIVATIONS[cfg.activation](layers.group_norm(cfg.num_groups, "norm_out")(x))
        x = layers.conv(cfg.out_channels * cfg.patch_size**2, "conv_out", zero_init=True)(x)
        x = layers.depth_to_space(x, cfg.patch_size)
        return x + z[..., -cfg.out_channels :] if cfg.lowres_residual else x
