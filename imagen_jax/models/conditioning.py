"""Conditioning of the U-Nets: one embedding of noise levels and pooled text, plus text tokens.

`ModelConfig` selects Imagen's variants or those of DeepFloyd IF. IF was trained on 1000 discrete
steps; `process.cosine_steps` is the table that maps logsnr to them.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from imagen_jax.config.schema import ModelConfig
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.models import attention, layers


def nearest_step(logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
    """The step of `cosine_steps` with the nearest logsnr, as a float."""
    table = jnp.asarray(cosine_steps(), jnp.float32)
    return jnp.argmin(jnp.abs(table - logsnr[:, None]), axis=1).astype(jnp.float32)


def sinusoidal(position: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Cosines and sines of `position` at wavelengths 2 pi .. 2 pi 10^4 (Vaswani et al. 2017).

    The frequencies are those of torch, bit for bit: float32 exponents, correctly rounded
    exponentials. At a position of 1000, a last bit of a frequency changes the angle by 6e-5.
    """
    exponent = np.float32(-np.log(1e4)) * np.arange(dim // 2, dtype=np.float32)
    exponent /= np.float32(dim // 2)
    angle = position[:, None] * np.exp(exponent.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class NoiseEmbedding(nn.Module):
    """Embeds logsnr [B] as [B, dim].

    time: logsnr is mapped to the cosine schedule's time, u = 2/pi atan(exp(-logsnr/2)) in [0, 1],
    and scaled to 0..30, so the shortest wavelength is a fifth of the range. (With ADM's 0..1000,
    half of the features are noise for continuous times.) Paper is silent on this.

    steps: sinusoids of the nearest of the 1000 discrete steps, with channels[0] features (IF).
    """

    config: ModelConfig
    dim: int

    @nn.compact
    def __call__(self, logsnr: Float[Array, " b"]) -> Float[Array, "b dim"]:
        cfg = self.config
        if cfg.noise_embedding == "steps":
            x = sinusoidal(nearest_step(logsnr), cfg.channels[0])
        else:
            u = jnp.arctan(jnp.exp(-0.5 * logsnr)) * (2.0 / jnp.pi)
            x = sinusoidal(30.0 * u, min(self.dim, 256))
        x = layers.dense(self.dim, "hidden")(x)
        return layers.dense(self.dim, "out")(layers.ACTIVATIONS[cfg.activation](x))


class TextPooling(nn.Module):
    """Pools text tokens [B, L, D] into one vector [B, dim] (Imagen, Sec. 2.5 and D.3.1).

    attention: the masked mean of the tokens is the query over the tokens, in heads of 64 channels.
    mean: the masked mean through one linear layer (the paper's weaker variant).
    Paper is silent on heads and query.
    """

    dim: int
    mode: str

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l d"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b dim"]:
        weight = mask[..., None].astype(text.dtype)
        mean = (text * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        if self.mode == "mean":
            return layers.dense(self.dim, "out")(mean)
        heads = max(1, self.dim // 64)
        query = layers.dense(self.dim, "query")(mean)[:, None]
        key, value = jnp.split(layers.dense(2 * self.dim, "key_value")(text), 2, axis=-1)
        pooled = attention.attend(query, key, value, heads=heads, mask=mask)
        return layers.dense(self.dim, "out")(pooled[:, 0])


class TokenPooling(nn.Module):
    """IF's pooling: an extra token, the mean plus a learned vector, attends to all tokens.

    LayerNorm before and after. The mask is ignored, because IF was trained on captions padded to a
    fixed length and pools over the padding.
    """

    dim: int
    heads: int

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l d"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b dim"]:
        del mask
        width = text.shape[-1]
        text = nn.LayerNorm(epsilon=1e-5, name="norm_in")(text)
        position = self.param("position", nn.initializers.normal(width**-0.5), (1, width))
        token = text.mean(axis=1, keepdims=True) + position
        query = layers.dense(width, "query")(token)
        pairs = layers.dense(2 * width, "key_value")(jnp.concatenate([token, text], axis=1))
        key, value = jnp.split(pairs, 2, axis=-1)
        pooled = attention.attend(query, key, value, heads=self.heads, mask=None)
        return nn.LayerNorm(epsilon=1e-5, name="norm_out")(
            layers.dense(self.dim, "out")(pooled[:, 0])
        )


class ConditioningEmbedding(nn.Module):
    """Embedding [B, dim] of noise level, pooled text and low-resolution noise level; text tokens.

    LayerNorm is applied to the text embeddings before attention and before pooling (Imagen, D.3.1).
    IF projects the tokens once instead and normalises them in each attention block. Without
    LayerNorm (text_norm="none", an ablation) they are used as the encoder gives them.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        logsnr: Float[Array, " b"],
        text_emb: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        lowres_logsnr: Float[Array, " b"] | None,
    ) -> tuple[Float[Array, "b dim"], Float[Array, "b l width"]]:
        cfg = self.config
        dim = cfg.embed_dim or 4 * cfg.channels[0]
        text_emb = text_emb.astype(jnp.float32)
        text = nn.LayerNorm(name="text_norm")(text_emb) if cfg.text_norm == "layer" else text_emb
        text = text.astype(cfg.dtype)
        if cfg.text_width:
            text = layers.dense(cfg.text_width, "text_projection")(text)

        embedding = NoiseEmbedding(cfg, dim, name="noise")(logsnr)
        if cfg.text_pooling == "token":
            embedding += TokenPooling(dim, cfg.pooling_heads, name="pooling")(text_emb, text_mask)
        else:
            if cfg.text_norm != "none":
                text_emb = nn.LayerNorm(name="pooling_norm")(text_emb)
            embedding += TextPooling(dim, cfg.text_pooling, name="pooling")(text_emb, text_mask)
        if lowres_logsnr is not None:
            embedding += NoiseEmbedding(cfg, dim, name="lowres_noise")(lowres_logsnr)
        return embedding.astype(cfg.dtype), text
