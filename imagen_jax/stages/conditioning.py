"""Conditioning: what a network sees beside z and its noise level (Imagen, Sec. 2.2-2.5).

Text embeddings with the null text of classifier-free guidance, and the low-resolution image of a
super-resolution stage with noise conditioning augmentation. Training (`loss`) and sampling
(`denoiser`) build the same `Conditioning`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process
from imagen_jax.io import images


class Text(NamedTuple):
    """Embeddings of B captions or prompts.

    Attributes:
      emb: [B, L, D] text embeddings, zero at padding.
      mask: [B, L], True at real tokens.
    """

    emb: Any
    mask: Any


class Conditioning(NamedTuple):
    """All inputs of a stage's network except z and logsnr, for B images.

    Attributes:
      text: embeddings and mask of the prompts.
      lowres: SR stages: [B, size, size, 3], the low-resolution image from `augment_lowres`.
      lowres_logsnr: SR stages: [B], its noise level, nats.
    """

    text: Text
    lowres: Array | None = None
    lowres_logsnr: Array | None = None


def null_text(text: Text) -> Text:
    """The text input of the unconditional model, for as many images as `text` has.

    Zero embeddings under one fixed mask, its first position, so that neither the values nor the
    length of the caption are visible. Differs from paper: it zeroes the embeddings and says nothing
    of the mask.
    """
    return drop_text(text, jnp.ones(text.mask.shape[:1], bool))


def drop_text(text: Text, drop: Bool[Array, " b"]) -> Text:
    """Replaces the text of the chosen examples by the null text, see `null_text`.

    Args:
      text: embeddings and mask of B captions.
      drop: True where the caption is dropped.
    """
    null_mask = jnp.zeros_like(text.mask).at[:, 0].set(True)
    return Text(
        jnp.where(drop[:, None, None], 0.0, text.emb),
        jnp.where(drop[:, None], null_mask, text.mask),
    )


def add_text_noise(text: Text, eps: Float[Array, "b l d"], level: float) -> Text:
    """Adds noise to the embeddings of the real tokens, in training (`diffusion.text_noise`).

    A network that trains on few captions otherwise learns each embedding by heart. The noise of a
    caption has the root mean square of its real tokens, times `level`.

    Args:
      text: embeddings and mask of B captions.
      eps: standard normal.
      level: 0 and above.
    """
    real = text.mask[..., None]
    count = jnp.maximum(real.sum((1, 2), keepdims=True) * text.emb.shape[2], 1)
    square = jnp.square(text.emb.astype(jnp.float32))
    rms = jnp.sqrt(jnp.where(real, square, 0.0).sum((1, 2), keepdims=True) / count)
    return Text(jnp.where(real, text.emb + level * rms * eps, text.emb), text.mask)


def upsample_corners(image: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """Bilinear upsampling that aligns the centres of the corner pixels (`align_corners` of torch).

    `images.upsample` aligns the corners of the images instead.
    """
    scale = jnp.full((2,), (size - 1) / max(image.shape[1] - 1, 1), jnp.float32)
    shape = (image.shape[0], size, size, image.shape[3])
    return jax.image.scale_and_translate(
        image, shape, (1, 2), scale, 0.5 * (1.0 - scale), "linear", antialias=False
    )


UPSAMPLINGS = {"bilinear": images.upsample, "corners": upsample_corners}


def augment_lowres(
    lowres: Float[Array, "b h w c"],
    aug_level: Float[Array, " b"],
    eps: Float[Array, "b n n c"],
    config: Config,
) -> Float[Array, "b size size c"]:
    """The low-resolution image upsampled to the stage's size and noised to `aug_level`.

    Noise conditioning augmentation (Imagen, Sec. 2.4, D.2). Paper is silent on whether the noise
    is added after the upsampling (`diffusion.aug_noise_size="image"`) or before ("lowres": less
    noise for a small network with `lowres_residual` to remove).

    Args:
      lowres: images of the stage before, in [-1, 1].
      aug_level: 0 (none) to 1 (noise alone).
      eps: standard normal, of side `aug_noise_side(config)`.
      config: the stage.
    """
    logsnr = process.aug_logsnr(aug_level, config.diffusion)

    upsample = UPSAMPLINGS[config.diffusion.aug_upsampling]
    if config.diffusion.aug_noise_size == "lowres":
        return upsample(process.q_sample(lowres, logsnr, eps), config.data.image_size)
    return process.q_sample(upsample(lowres, config.data.image_size), logsnr, eps)


def add_lowres(
    text: Text,
    lowres: Float[Array, "b h w c"],
    aug_level: Float[Array, " b"],
    eps: Float[Array, "b n n c"],
    config: Config,
) -> Conditioning:
    """The conditioning of an SR stage; arguments beside `text` as those of `augment_lowres`."""
    noisy = augment_lowres(lowres, aug_level, eps, config)
    return Conditioning(text, noisy, process.aug_logsnr(aug_level, config.diffusion))


def aug_noise_side(config: Config) -> int:
    """Side of the noise that `augment_lowres` takes, pixels."""
    at_lowres = config.diffusion.aug_noise_size == "lowres"
    return config.data.lowres_size if at_lowres else config.data.image_size
