"""The training loss of a stage, with all of its randomness in one place (Imagen, Sec. 2.2-2.4).

`sample_randomness` samples times, noise, dropped captions and augmentation levels of a step from
the step's key; `loss_given_randomness` is the loss for these.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import likelihood, process
from imagen_jax.stages.conditioning import (
    Conditioning,
    Text,
    add_lowres,
    add_text_noise,
    aug_noise_side,
    drop_text,
)
from imagen_jax.stages.network import Params, apply

DROPOUT_STREAM, TEXT_NOISE_STREAM = 0, 1
# The loss is also reported by noise level: bounds between the intervals, logsnr in nats.
LOGSNR_EDGES = np.array([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])

Batch = Mapping[str, Array]


def check_trainable(config: Config) -> None:
    """Raises ConfigError where a stage samples in a way that training does not support."""
    if config.text.null != "zeros" and config.diffusion.cond_drop_prob > 0:
        raise ConfigError(
            f"config.text.null={config.text.null!r} is for sampling; training drops captions to "
            "'zeros'. To tune a stage without dropping captions, set "
            "config.diffusion.cond_drop_prob=0"
        )


def loss_fn(
    params: Params, batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`loss_given_randomness` of a batch with the randomness of `key`."""
    randomness = sample_randomness(key, batch["image"].shape[0], config)
    dropout_key = jax.random.fold_in(key, DROPOUT_STREAM)
    return loss_given_randomness(params, {**batch, **randomness}, dropout_key, config)


def sample_randomness(key: Key[Array, ""], size: int, config: Config) -> dict[str, Array]:
    """The randomness of a step: every example's time, noise, dropped text and aug_level.

    Args:
      key: of the step.
      size: examples B.
      config: the stage.

    Returns:
      time [B] in [0,1], eps [B,H,W,3], drop [B]; SR: aug_level [B], lowres_eps [B,n,n,3]; with
      `diffusion.text_noise`: text_eps [B,L,D].
    """
    key_t, key_eps, key_drop, key_level, key_lowres = jax.random.split(key, 5)
    side = config.data.image_size
    randomness = {
        "time": process.stratified_timesteps(key_t, size),
        "eps": jax.random.normal(key_eps, (size, side, side, 3)),
        "drop": jax.random.bernoulli(key_drop, config.diffusion.cond_drop_prob, (size,)),
    }
    if config.model.lowres:
        side, highest = aug_noise_side(config), config.diffusion.aug_level_max
        randomness["aug_level"] = jax.random.uniform(key_level, (size,), maxval=highest)
        randomness["lowres_eps"] = jax.random.normal(key_lowres, (size, side, side, 3))
    if config.diffusion.text_noise:
        shape = (size, config.data.max_text_len, config.model.text_dim)
        key_text = jax.random.fold_in(key, TEXT_NOISE_STREAM)
        randomness["text_eps"] = jax.random.normal(key_text, shape)
    return randomness


def sample_timesteps(key: Key[Array, ""], size: int) -> Float[Array, " b"]:
    """The time of every example of a step, as in `sample_randomness`; samples nothing else."""
    return process.stratified_timesteps(jax.random.split(key, 5)[0], size)


def loss_given_randomness(
    params: Params, batch: Batch, dropout_key: Key[Array, ""] | None, config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted squared error of the network's output, mean over images, pixels and channels.

    Args:
      params: plain parameters.
      batch: image [B,H,W,3] in [-1,1], text_emb [B,L,D], text_mask [B,L], SR: lowres [B,h,w,3];
        the values of `sample_randomness`; and x0_target [B,H,W,3] where the network learns another
        x0 than the image, see `distillation`.
      dropout_key: randomness of the dropout layers; None: no dropout.
      config: the stage.

    Returns:
      The loss, and {"loss", "x0_mse", "loss_by_noise_level"}: x0_mse is the unweighted error of x0,
      comparable over prediction types; with `diffusion.vlb_weight` also "vlb", an estimate of the
      variational bound in bits per dimension, and the loss is L_simple + vlb_weight vlb (Nichol &
      Dhariwal 2021, Eq. 16); loss_by_noise_level [2, intervals] has, per interval of
      logsnr (LOGSNR_EDGES), the summed loss and the number of examples.
    """
    settings, x0, eps = config.diffusion, batch["image"], batch["eps"]
    z, logsnr, conditioning = network_inputs(batch, config)
    if "x0_target" in batch:
        x0 = batch["x0_target"]
        eps = process.to_eps(x0, z=z, logsnr=logsnr)

    channels = apply(params, config, z, logsnr, conditioning, dropout_key=dropout_key)
    output = channels[..., :3]
    target = process.prediction_target(settings.prediction, x0=x0, eps=eps, logsnr=logsnr)
    error = jnp.mean(jnp.square(output - target), axis=(1, 2, 3))
    losses = process.output_loss_weight(settings.loss_weight, settings.prediction, logsnr) * error
    loss = jnp.mean(losses)

    x0_hat = process.to_x0(settings.prediction, output, z=z, logsnr=logsnr)
    x0_mse = jnp.mean(jnp.square(jnp.clip(x0_hat, -1.0, 1.0) - x0))
    interval = jax.nn.one_hot(jnp.searchsorted(LOGSNR_EDGES, logsnr), len(LOGSNR_EDGES) + 1)
    by_noise_level = jnp.stack([losses, jnp.ones_like(losses)]) @ interval
    report = {"loss": loss, "x0_mse": x0_mse, "loss_by_noise_level": by_noise_level}
    if settings.vlb_weight:
        # The bound trains the variance alone: its mean has no gradient (Nichol & Dhariwal 2021).
        # It is that of the images also where the mean learns x0_target.
        gamma = 0.5 * (channels[..., 3:6] + 1.0)
        mean = jax.lax.stop_gradient(x0_hat)
        bound = likelihood.step_bound(batch["image"], mean, gamma, batch["time"], settings)
        report["vlb"] = likelihood.STEPS * jnp.mean(bound)
        report["loss"] = loss = loss + settings.vlb_weight * report["vlb"]
    return loss, report


def network_inputs(
    batch: Batch, config: Config
) -> tuple[Float[Array, "b h w 3"], Float[Array, " b"], Conditioning]:
    """z, logsnr in nats and conditioning of a batch with the values of `sample_randomness`."""
    settings = config.diffusion
    logsnr = process.logsnr_at(batch["time"], settings)
    z = process.q_sample(batch["image"], logsnr, batch["eps"])
    text = Text(batch["text_emb"], batch["text_mask"])
    if settings.text_noise:
        text = add_text_noise(text, batch["text_eps"], settings.text_noise)
    text = drop_text(text, batch["drop"])
    if not config.model.lowres:
        return z, logsnr, Conditioning(text)
    lowres = batch["lowres"], batch["aug_level"], batch["lowres_eps"]
    return z, logsnr, add_lowres(text, *lowres, config)
