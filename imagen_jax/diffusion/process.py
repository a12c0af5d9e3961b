"""The maths of the diffusion process: schedules, forward noising, predictions, loss weights.

Variance preserving, continuous time (Imagen, Sec. 2.2 and App. A): `z = alpha x0 + sigma eps` with
`logsnr = log(alpha^2 / sigma^2)`, `t in [0, 1]`, 0 = clean. Pure functions of arrays. Every
prediction is converted to x0 once, by `to_x0`; guidance, thresholding and samplers work on x0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from numpy.typing import DTypeLike

from imagen_jax.config.schema import DiffusionConfig

LogsnrSchedule = Callable[[Float[Array, "*t"]], Float[Array, "*t"]]


def cosine_logsnr(t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Cosine schedule, logsnr = -2 log tan(pi t / 2) (Nichol & Dhariwal 2021; Imagen, App. A)."""
    # float32's pi / 2 is beyond the pole, where tan is negative and its logarithm NaN.
    return -2.0 * jnp.log(jnp.abs(jnp.tan(jnp.pi * t / 2.0)))


def linear_logsnr(t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Continuous form of the 1000-step linear schedule 1e-4..0.02 (Ho et al. 2020).

    logsnr = -log expm1(0.1 t + 9.95 t^2), the third stage's schedule (Imagen, App. F.3).
    """
    return -jnp.log(jnp.expm1(0.1 * t + 9.95 * t**2))


DISCRETE_STEPS = 1000


def cosine_steps(
    count: int = DISCRETE_STEPS, dtype: DTypeLike = np.float64
) -> Float[np.ndarray, " n"]:
    """logsnr in nats of the steps 0 .. count-1 of the discrete cosine schedule, decreasing.

    Nichol & Dhariwal 2021, Eq. 17: alpha_bar(t) = cos^2(pi/2 (t + 0.008) / 1.008), with each step's
    beta at most 0.999. DeepFloyd IF was trained on this table.

    Args:
      count: number of steps.
      dtype: of the betas and of their product. diffusers' is float32, whose rounding changes sigma
        of step 0 by 4e-4 relative.
    """
    t = np.arange(count + 1) / count
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    alphas = np.asarray(1.0, dtype) - betas.astype(dtype)
    signal = np.cumprod(alphas.astype(np.float64)).astype(dtype).astype(np.float64)
    return np.log(signal) - np.log1p(-signal)


def cosine_steps_logsnr(t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """`cosine_steps` in float32 as a schedule: time t is timestep floor(1000 t), at most 999."""
    # k / 1000 is rounded in float32; a hundredth of a step is far more than that.
    step = jnp.floor(t * DISCRETE_STEPS + 0.01).astype(jnp.int32)
    table = jnp.asarray(cosine_steps(dtype=np.float32), jnp.float32)
    return table[jnp.clip(step, 0, DISCRETE_STEPS - 1)]


SCHEDULES: dict[str, LogsnrSchedule] = {
    "cosine": cosine_logsnr,
    "linear": linear_logsnr,
    "cosine_steps": cosine_steps_logsnr,
}


def logsnr_at(t: Float[Array, "*t"], config: DiffusionConfig) -> Float[Array, "*t"]:
    """logsnr of the stage's own process at time t, shifted and clipped.

    Args:
      t: times in [0, 1]; 0 is clean.
      config: schedule, `logsnr_shift` (simple diffusion, arXiv:2301.11093, Eq. 4) and clips.

    Returns:
      logsnr in nats within [logsnr_min, logsnr_max]: finite at both ends, where the schedules are
      not. Paper is silent on the clip.
    """
    logsnr = SCHEDULES[config.schedule](t) + config.logsnr_shift
    return jnp.clip(logsnr, config.logsnr_min, config.logsnr_max)


def aug_logsnr(aug_level: Float[Array, "*t"], config: DiffusionConfig) -> Float[Array, "*t"]:
    """logsnr of the low-resolution image noised to `aug_level` in [0, 1].

    Noise conditioning augmentation (Imagen, Sec. 2.4): the VP process at time aug_level. Paper is
    silent on the schedule; `diffusion.aug_schedule` names it, unshifted.
    """
    logsnr = SCHEDULES[config.aug_schedule](aug_level)
    return jnp.clip(logsnr, config.logsnr_min, config.logsnr_max)


def stratified_timesteps(key: Key[Array, ""], count: int) -> Float[Array, " b"]:
    """Stratified timesteps of a batch: one in each of B equal parts of [0, 1], one common offset.

    Each t is still U(0, 1); the batch mean has less variance (arXiv:2107.00630, App. I.1). Differs
    from paper: independent t.
    """
    return (jax.random.uniform(key, ()) + jnp.arange(count) / count) % 1.0


def alpha_sigma(logsnr: Float[Array, "*t"]) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Signal and noise scale, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def expand(per_example: Float[Array, " b"], like: Float[Array, "b *rest"]) -> Array:
    """Reshapes one value per example so that it broadcasts over the axes of `like`."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - per_example.ndim))


def q_sample(
    x0: Float[Array, "b *d"], logsnr: Float[Array, " b"], eps: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """Samples z from q(z | x0): z = alpha x0 + sigma eps."""
    alpha, sigma = (expand(s, x0) for s in alpha_sigma(logsnr))
    return alpha * x0 + sigma * eps


PREDICTIONS = ("eps", "x0", "v")


def prediction_target(
    prediction: str,
    *,
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    logsnr: Float[Array, " b"],
) -> Float[Array, "b *d"]:
    """Target of the network: eps, x0, or v = alpha eps - sigma x0 (arXiv:2202.00512)."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    alpha, sigma = (expand(s, x0) for s in alpha_sigma(logsnr))
    return alpha * eps - sigma * x0


def to_x0(
    prediction: str,
    output: Float[Array, "b *d"],
    *,
    z: Float[Array, "b *d"],
    logsnr: Float[Array, " b"],
) -> Float[Array, "b *d"]:
    """The clean image x0 of a network's output.

    eps: x0 = (z - sigma eps) / alpha (Imagen, Sec. 2.2); v: x0 = alpha z - sigma v.
    """
    if prediction == "x0":
        return output
    alpha, sigma = (expand(s, z) for s in alpha_sigma(logsnr))
    if prediction == "eps":
        return (z - sigma * output) / alpha
    return alpha * z - sigma * output


def to_eps(
    x0: Float[Array, "b *d"], *, z: Float[Array, "b *d"], logsnr: Float[Array, " b"]
) -> Float[Array, "b *d"]:
    """The noise in z for a given x0: eps = (z - alpha x0) / sigma."""
    alpha, sigma = (expand(s, z) for s in alpha_sigma(logsnr))
    return (z - alpha * x0) / sigma


# Weights w(logsnr) on the squared error of x0; the loss is mean(w * |x0 - x0_hat|^2). The paper's
# plain eps loss has w = SNR, because |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2.
LOSS_WEIGHTS: dict[str, Callable[[Float[Array, " b"]], Float[Array, " b"]]] = {
    "eps": jnp.exp,
    "x0": jnp.ones_like,
    "v": lambda logsnr: jnp.exp(logsnr) + 1.0,
    # min-SNR with gamma = 5 (arXiv:2303.09556).
    "min_snr": lambda logsnr: jnp.minimum(jnp.exp(logsnr), 5.0),
    # min(SNR + 1, 6): the v weight, truncated where images are nearly clean.
    "truncated_v": lambda logsnr: jnp.minimum(jnp.exp(logsnr) + 1.0, 6.0),
    # sigmoid weight with bias 2 on the eps error (arXiv:2303.00848; arXiv:2410.19324, Eq. 7).
    "sigmoid": lambda logsnr: jnp.exp(logsnr) * jax.nn.sigmoid(2.0 - logsnr),
}


def output_loss_weight(
    name: str, prediction: str, logsnr: Float[Array, " b"]
) -> Float[Array, " b"]:
    """The weight `LOSS_WEIGHTS[name]`, converted to the error of the network's own output.

    |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2 and |v - v_hat|^2 = (SNR + 1) |x0 - x0_hat|^2, so the
    loss is computed on the output itself, without a division by a vanishing alpha or sigma.
    """
    if name == prediction:
        return jnp.ones_like(logsnr)
    weight = LOSS_WEIGHTS[name](logsnr)
    if prediction == "eps":
        return weight * jnp.exp(-logsnr)
    if prediction == "v":
        return weight * jax.nn.sigmoid(-logsnr)
    return weight
