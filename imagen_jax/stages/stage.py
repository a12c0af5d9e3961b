"""One stage of a cascade: what its network is told, how it is trained, how it denoises.

Everything that joins text, noise and the low-resolution picture into a network call is here, once,
for training and for sampling (Imagen, Sec. 2.2-2.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import guidance, thresholding
from imagen_jax.diffusion import process as diffusion
from imagen_jax.io import images
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.unet import UNet

MODELS = {"unet": UNet, "efficient_unet": EfficientUNet}

DROPOUT_STREAM = 0
# The loss is also reported by noise level: bounds between the bins, logsnr in nats.
LOGSNR_EDGES = np.array([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])

Params = Any
Batch = Mapping[str, Array]
Text = tuple[Float[Array, "b l d"], Bool[Array, "b l"]]  # embeddings and mask of B prompts


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters, each boxed with its logical axis names.

    Raises:
      ConfigError: `model.text_dim` is not set, or the picture does not survive the downsampling.
    """
    model, size, dim = config.model, config.data.image_size, config.model.text_dim
    if dim < 1:
        raise ConfigError(
            f"config.model.text_dim={dim} must be the width of the text embeddings, at least 1"
        )
    strides = len(model.channels) - 1
    if model.name == "efficient_unet":
        strides = sum(model.strided_stem or (True,) * len(model.channels))
    unit = model.patch_size * 2**strides
    if size % unit:
        raise ConfigError(
            f"config.data.image_size={size} must be a multiple of {unit} "
            f"(patch_size {model.patch_size} and {strides} halvings); try {-(-size // unit) * unit}"
        )
    channels = 6 if model.lowres else 3
    one = jnp.zeros((1,))
    arguments = (
        jnp.zeros((1, size, size, channels)),
        one,
        jnp.zeros((1, config.data.max_text_len, dim)),
        jnp.ones((1, config.data.max_text_len), bool),
    )
    network = MODELS[model.name](model)
    variables = network.init(key, *arguments, lowres_logsnr=one if model.lowres else None)
    return variables["params"]


def drop_text(
    text_emb: Float[Array, "b l d"], text_mask: Bool[Array, "b l"], drop: Bool[Array, " b"]
) -> tuple[Float[Array, "b l d"], Bool[Array, "b l"]]:
    """Replaces the text of the chosen examples by the null text.

    The null text is zero embeddings under one fixed mask, its first position, so that neither the
    values nor the length of the caption are seen. Differs from paper: it zeroes the embeddings and
    says nothing of the mask.
    """
    null_mask = jnp.zeros_like(text_mask).at[:, 0].set(True)
    return (
        jnp.where(drop[:, None, None], 0.0, text_emb),
        jnp.where(drop[:, None], null_mask, text_mask),
    )


def augment_lowres(
    lowres: Float[Array, "b h w c"],
    aug_level: Float[Array, " b"],
    eps: Float[Array, "b n n c"],
    config: Config,
) -> Float[Array, "b size size c"]:
    """The conditioning picture: upsampled to the stage's size and noised to `aug_level`.

    Noise conditioning augmentation (Imagen, Sec. 2.4, D.2). Paper is silent on whether the noise
    comes after the upsampling ("image": pixels of the large picture) or before ("lowres": a small
    network with `lowres_residual` has far less noise to carry).

    Args:
      lowres: pictures of the stage before, in [-1, 1].
      aug_level: 0 (none) to 1 (noise alone).
      eps: standard normal, of side `aug_noise_side(config)`.
      config: the stage.
    """
    logsnr = diffusion.aug_logsnr(aug_level, config.diffusion)
    if config.diffusion.aug_noise_size == "lowres":
        return images.upsample(diffusion.q_sample(lowres, logsnr, eps), config.data.image_size)
    return diffusion.q_sample(images.upsample(lowres, config.data.image_size), logsnr, eps)


def aug_noise_side(config: Config) -> int:
    """Side of the noise that `augment_lowres` wants, pixels."""
    at_lowres = config.diffusion.aug_noise_size == "lowres"
    return config.data.lowres_size if at_lowres else config.data.image_size


def loss_fn(
    params: Params, batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`loss_given_randomness` of a batch with the randomness of `key`."""
    draws = draw(key, batch["image"].shape[0], config)
    return loss_given_randomness(
        params, {**batch, **draws}, jax.random.fold_in(key, DROPOUT_STREAM), config
    )


def draw(key: Key[Array, ""], size: int, config: Config) -> dict[str, Array]:
    """The randomness of a step: every example's time, noise, dropped text and aug_level.

    Args:
      key: of the step.
      size: examples B.
      config: the stage.

    Returns:
      time [B] in [0,1], eps [B,H,W,3], drop [B]; SR: aug_level [B], lowres_eps [B,n,n,3].
    """
    key_t, key_eps, key_drop, key_level, key_lowres = jax.random.split(key, 5)
    side = config.data.image_size
    draws = {
        "time": diffusion.stratified_timesteps(key_t, size),
        "eps": jax.random.normal(key_eps, (size, side, side, 3)),
        "drop": jax.random.bernoulli(key_drop, config.diffusion.cond_drop_prob, (size,)),
    }
    if config.model.lowres:
        side, highest = aug_noise_side(config), config.diffusion.aug_level_max
        draws["aug_level"] = jax.random.uniform(key_level, (size,), maxval=highest)
        draws["lowres_eps"] = jax.random.normal(key_lowres, (size, side, side, 3))
    return draws


def loss_given_randomness(
    params: Params, batch: Batch, dropout_key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted squared error of the network's output, mean over pictures, pixels and channels.

    Args:
      params: plain parameters.
      batch: image [B,H,W,3] in [-1,1], text_emb [B,L,D], text_mask [B,L], SR: lowres [B,h,w,3];
        and what `draw` drew.
      dropout_key: randomness of the dropout layers.
      config: the stage.

    Returns:
      The loss, and {"loss", "x0_mse", "loss_by_noise_level"}: x0_mse is the unweighted error of x0,
      comparable over prediction types; loss_by_noise_level [2, bins] are, by noise level (LOGSNR_EDGES), the
      summed loss and the number of the examples.
    """
    process, x0 = config.diffusion, batch["image"]
    logsnr = diffusion.logsnr_at(batch["time"], process)
    z = diffusion.q_sample(x0, logsnr, batch["eps"])
    text_emb, text_mask = drop_text(batch["text_emb"], batch["text_mask"], batch["drop"])

    network_input, lowres_logsnr = z, None
    if config.model.lowres:
        aug_level = batch["aug_level"]
        lowres = augment_lowres(batch["lowres"], aug_level, batch["lowres_eps"], config)
        network_input = jnp.concatenate([z, lowres], axis=-1)
        lowres_logsnr = diffusion.aug_logsnr(aug_level, process)

    output = (
        MODELS[config.model.name](config.model)
        .apply(
            {"params": params},
            network_input,
            logsnr,
            text_emb,
            text_mask,
            lowres_logsnr=lowres_logsnr,
            train=True,
            rngs={"dropout": dropout_key},
        )
        .astype(jnp.float32)
    )
    output = _prediction(output)
    target = diffusion.prediction_target(process.prediction, x0=x0, eps=batch["eps"], logsnr=logsnr)
    error = jnp.mean(jnp.square(output - target), axis=(1, 2, 3))
    weight = diffusion.output_loss_weight(process.loss_weight, process.prediction, logsnr)
    losses = weight * error
    loss = jnp.mean(losses)

    x0_hat = diffusion.to_x0(process.prediction, output, z=z, logsnr=logsnr)
    x0_mse = jnp.mean(jnp.square(jnp.clip(x0_hat, -1.0, 1.0) - x0))
    bins = jax.nn.one_hot(jnp.searchsorted(LOGSNR_EDGES, logsnr), len(LOGSNR_EDGES) + 1)
    loss_by_noise_level = jnp.stack([losses, jnp.ones_like(losses)]) @ bins
    return loss, {"loss": loss, "x0_mse": x0_mse, "loss_by_noise_level": loss_by_noise_level}


def _prediction(output: Float[Array, "b h w out"]) -> Float[Array, "b h w 3"]:
    """The part of a network's output that predicts; IF's learned variance is left behind."""
    return output[..., :3]


def estimates(
    network: tuple[Params, Config],
    z: Float[Array, "b size size 3"],
    logsnr: Float[Array, " b"],
    texts: Sequence[Text],
    *,
    lowres: Float[Array, "b size size c"] | None = None,
    lowres_logsnr: Float[Array, " b"] | None = None,
) -> list[Float[Array, "b size size 3"]]:
    """x0 of the same z for each of several texts, by one evaluation of the network.

    Args:
      network: plain parameters and the stage they belong to.
      z: noisy pictures.
      logsnr: their noise level, nats.
      texts: embeddings and mask, B of each; K texts are a batch of K B.
      lowres: SR stages: from `augment_lowres`.
      lowres_logsnr: SR stages: its noise level, nats.
    """
    params, config = network

    # The K of a picture are neighbours: on whichever device the picture lies, there it stays.
    def repeat(v: Array) -> Array:
        return jnp.repeat(v, len(texts), axis=0)

    text_emb, text_mask = (
        jnp.stack(part, axis=1).reshape(-1, *part[0].shape[1:]) for part in zip(*texts, strict=True)
    )
    z, logsnr = repeat(z), repeat(logsnr)
    inputs = z if lowres is None else jnp.concatenate([z, repeat(lowres)], axis=-1)
    if lowres_logsnr is not None:
        lowres_logsnr = repeat(lowres_logsnr)
    output = MODELS[config.model.name](config.model).apply(
        {"params": params}, inputs, logsnr, text_emb, text_mask, lowres_logsnr=lowres_logsnr
    )
    output = _prediction(output.astype(jnp.float32))
    x0 = diffusion.to_x0(config.diffusion.prediction, output, z=z, logsnr=logsnr)
    x0 = x0.reshape(-1, len(texts), *x0.shape[1:])
    return [x0[:, text] for text in range(len(texts))]


def denoiser(
    params: Params,
    config: Config,
    *,
    text_emb: Float[Array, "b l d"],
    text_mask: Bool[Array, "b l"],
    lowres: Float[Array, "b size size c"] | None = None,
    aug_level: Float[Array, " b"] | None = None,
    negative: Text | None = None,
    guide: tuple[Params, Config] | None = None,
    guidance_weight: Float[Array, " b"] | None = None,
) -> guidance.Denoise:
    """`denoise(z, logsnr) -> x0` of this stage with its guidance and thresholding.

    Guidance leads from another estimate of x0 to this stage's own of the text. The other one is,
    without `guide`, this network's without text, or of `negative`; both are evaluated as one batch
    of 2B. With `guide` (autoguidance) it is that network's of the same text, or of `negative`.

    Args:
      params: plain parameters, usually the EMA.
      config: the stage; `sampling` gives guidance and thresholding.
      text_emb: embeddings of the prompts.
      text_mask: True at real tokens.
      lowres: SR stages: from `augment_lowres`, drawn once per picture.
      aug_level: SR stages: the level it was noised to.
      negative: embeddings and mask of what to lead away from, shaped as those of the prompts.
      guide: parameters and stage of a weaker checkpoint that draws the same pictures.
      guidance_weight: of each picture, in place of `sampling.guidance_weight`, unless that is 1
        and guidance off.

    Raises:
      ConfigError: the guide does not draw the same pictures, or reads other embeddings.
    """
    settings, text = config.sampling, (text_emb, text_mask)
    given = {"lowres": lowres}
    if aug_level is not None:
        given["lowres_logsnr"] = diffusion.aug_logsnr(aug_level, config.diffusion)
    if guide is not None:
        check_guide(config, guide[1])

    def conditional(z: Array, logsnr: Array) -> Array:
        return estimates((params, config), z, logsnr, [text], **given)[0]

    def pair(z: Array, logsnr: Array) -> tuple[Array, Array]:
        if guide is not None:
            other = estimates(guide, z, logsnr, [negative or text], **given)[0]
            return conditional(z, logsnr), other
        other = negative or drop_text(*text, jnp.ones(text_mask.shape[:1], bool))
        x0, x0_other = estimates((params, config), z, logsnr, [text, other], **given)
        return x0, x0_other

    if settings.guidance_weight == 1.0:
        return thresholding.threshold(conditional, settings)
    levels = diffusion.logsnr_at(jnp.linspace(1.0, 0.0, settings.steps + 1), config.diffusion)
    guided = guidance.guide(pair, settings, levels, guidance_weight)
    return thresholding.threshold(guided, settings)


def check_guide(config: Config, guide: Config) -> None:
    """Raises ConfigError unless the stage `guide` can guide the stage `config` (autoguidance)."""
    for field in ("data.image_size", "data.lowres_size", "model.text_dim"):
        section, name = field.split(".")
        got, expected = (getattr(getattr(c, section), name) for c in (guide, config))
        if got != expected:
            raise ConfigError(
                f"guide: config.{field}={got} must be {expected}, as in the stage "
                f"{config.name!r} that it guides; try an earlier checkpoint of that stage"
            )
