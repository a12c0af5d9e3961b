"""The variational bound of one step of a discrete chain, which trains a learned variance.

Ho et al. 2020, Eq. 5; Nichol & Dhariwal 2021, Sec. 3.1. The chain has 1000 steps: that of time t
ends at t - 1/1000. Its term is the KL divergence of the model's step from the posterior; that of
the first step, which ends at the clean image, is the likelihood of its 8-bit values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import process
from imagen_jax.diffusion.process import alpha_sigma, expand
from imagen_jax.diffusion.samplers import learned_log_variance

STEPS = process.DISCRETE_STEPS
HALF_LEVEL = 1.0 / 255.0  # Half the distance of two 8-bit values in [-1, 1].


def gaussian_kl(
    mean_difference: Float[Array, "*d"],
    log_variance: Float[Array, "*d"],
    model_log_variance: Float[Array, "*d"],
) -> Float[Array, "*d"]:
    """KL(q || p) of two normal distributions, in nats.

    Args:
      mean_difference: of their means.
      log_variance: of q.
      model_log_variance: of p.
    """
    ratio = log_variance - model_log_variance
    squared = jnp.square(mean_difference) * jnp.exp(-model_log_variance)
    return 0.5 * (jnp.exp(ratio) - 1.0 - ratio + squared)


def discretized_nll(
    x0: Float[Array, "*d"], mean: Float[Array, "*d"], log_variance: Float[Array, "*d"]
) -> Float[Array, "*d"]:
    """-log probability in nats of the 8-bit value x0 under a normal distribution (Ho, Eq. 13).

    The density is integrated over the interval of the value; those of -1 and 1 are unbounded.
    """
    scale = jnp.exp(-0.5 * log_variance)
    above = jnp.where(x0 > 0.999, jnp.inf, (x0 - mean + HALF_LEVEL) * scale)
    below = jnp.where(x0 < -0.999, -jnp.inf, (x0 - mean - HALF_LEVEL) * scale)
    # In the upper half the difference is that of the complements, which does not cancel.
    upper = below > 0
    first, second = jnp.where(upper, -below, above), jnp.where(upper, -above, below)
    probability = jax.scipy.stats.norm.cdf(first) - jax.scipy.stats.norm.cdf(second)
    return -jnp.log(jnp.maximum(probability, 1e-12))


def step_bound(
    x0: Float[Array, "b h w c"],
    x0_hat: Float[Array, "b h w c"],
    gamma: Float[Array, "b h w c"],
    time: Float[Array, " b"],
    config: DiffusionConfig,
) -> Float[Array, " b"]:
    """The bound's term of the step from `time`, in bits per dimension; the sum of 1000 is L_vlb.

    Args:
      x0: clean images.
      x0_hat: their estimate, which gives the mean of the model's step.
      gamma: of the learned variance, see `guidance.Estimate`.
      time: of each image, in [0, 1].
      config: the process.
    """
    first = time < 1.0 / STEPS
    # The log variance of the first step is interpolated down to that of the second, as in Nichol &
    # Dhariwal's code: the posterior of the first has none.
    later = jnp.where(first, 1.5 / STEPS, time)
    logsnr_t = process.logsnr_at(later, config)
    logsnr_s = process.logsnr_at(later - 1.0 / STEPS, config)
    model = learned_log_variance(gamma, logsnr_t, logsnr_s)
    posterior = learned_log_variance(jnp.zeros_like(gamma), logsnr_t, logsnr_s)
    alpha_s, _ = alpha_sigma(logsnr_s)
    weight = expand(-jnp.expm1(logsnr_t - logsnr_s) * alpha_s, x0)
    kl = gaussian_kl(weight * (x0 - x0_hat), posterior, model)

    _, sigma = alpha_sigma(process.logsnr_at(time, config))
    log_beta = expand(2.0 * jnp.log(sigma), x0)
    nll = discretized_nll(x0, x0_hat, gamma * log_beta + (1.0 - gamma) * posterior)
    nll, kl = (jnp.mean(term, axis=(1, 2, 3)) for term in (nll, kl))
    return jnp.where(first, nll, kl) / jnp.log(2.0)
