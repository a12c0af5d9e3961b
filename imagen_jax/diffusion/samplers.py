"""Samplers as (init, step) pairs, and the loop that runs all of them.

A sampler sees `denoise(z, logsnr) -> x0` and two noise levels per step, logsnr_t (noisier) and
logsnr_s (cleaner). Guidance, thresholding and conditioning are inside `denoise`. A new sampler is
one function and one row of SAMPLERS; a sampler with options also has a row in OPTIONS, which says
which fields of `SamplingConfig` it takes.

The noise of every image comes from the image's own key, so an image does not depend on its
neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion.guidance import Denoise, Estimate
from imagen_jax.diffusion.process import alpha_sigma, expand


class Sampler(NamedTuple):
    """A sampler; the shape of optax.GradientTransformation.

    Attributes:
      init: z -> sampler state.
      step: (denoise, z, logsnr_t [B], logsnr_s [B], keys [B], state) -> (z at logsnr_s, state);
        in place of keys, noise [B, H, W, C] may be given, see `normal`.
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]


def fold_in_keys(keys: Key[Array, " b"], number: Integer[Array, ""] | int) -> Key[Array, " b"]:
    """`jax.random.fold_in` of each of the keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def is_given(noise: Array) -> bool:
    """Whether `noise` is itself noise, in place of the keys that it is sampled from."""
    return not jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


def normal(
    keys: Key[Array, " b"] | Float[Array, "b *d"], shape: tuple[int, ...]
) -> Float[Array, "b *d"]:
    """Standard normal noise; that of image i depends on keys[i] alone. Given noise is returned."""
    if is_given(keys):
        return keys
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def ddpm(gamma: float = 0.0, variance: str = "fixed") -> Sampler:
    """Ancestral sampling from q(z_s | z_t, x0) (Ho et al. 2020; Imagen, App. A).

    mean = r (alpha_s / alpha_t) z + (1 - r) alpha_s x0, with r = exp(logsnr_t - logsnr_s);
    variance = ((1 - r) sigma_s^2)^(1 - gamma) ((1 - r) sigma_t^2)^gamma.

    Args:
      gamma: 0 is the smaller variance (that of the posterior), 1 the larger. Paper is silent on
        the value it used.
      variance: learned: gamma of each pixel is the network's, and `denoise` returns an `Estimate`
        (learned range, Nichol & Dhariwal 2021, Eq. 15). As in their code, the logarithm of the
        small variance is that of at least 1e-20.
    """
    learned = variance == "learned"

    def step(denoise: Callable[..., Any], z, logsnr_t, logsnr_s, keys, state):
        x0, pixel_gamma = denoise(z, logsnr_t) if learned else (denoise(z, logsnr_t), None)
        mean, deviation = _posterior(x0, z, logsnr_t, logsnr_s, gamma)
        if pixel_gamma is not None:
            deviation = jnp.exp(0.5 * learned_log_variance(pixel_gamma, logsnr_t, logsnr_s))
        return mean + deviation * normal(keys, z.shape[1:]), state

    return Sampler(init=lambda z: (), step=step)


def _posterior(
    x0: Array, z: Array, logsnr_t: Array, logsnr_s: Array, gamma: float = 0.0
) -> tuple[Array, Array]:
    """Mean and standard deviation of q(z_s | z_t, x0), see `ddpm`."""
    alpha_t, sigma_t = (expand(v, z) for v in alpha_sigma(logsnr_t))
    alpha_s, sigma_s = (expand(v, z) for v in alpha_sigma(logsnr_s))
    r = expand(jnp.exp(logsnr_t - logsnr_s), z)
    # 1 - r, but exact where the two levels are close.
    one_minus_r = expand(-jnp.expm1(logsnr_t - logsnr_s), z)
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x0
    return mean, jnp.sqrt(one_minus_r) * sigma_s ** (1.0 - gamma) * sigma_t**gamma


def learned_log_variance(
    gamma: Float[Array, "b *d"], logsnr_t: Float[Array, " b"], logsnr_s: Float[Array, " b"]
) -> Float[Array, "b *d"]:
    """log variance of z_s given z_t (Nichol & Dhariwal 2021, Eq. 15), interpolated per pixel.

    gamma log((1 - r) sigma_t^2) + (1 - gamma) log((1 - r) sigma_s^2), r = exp(logsnr_t - logsnr_s).
    """
    _, sigma_t = (expand(v, gamma) for v in alpha_sigma(logsnr_t))
    _, sigma_s = (expand(v, gamma) for v in alpha_sigma(logsnr_s))
    one_minus_r = expand(-jnp.expm1(logsnr_t - logsnr_s), gamma)
    small, large = (jnp.log(jnp.maximum(one_minus_r * s**2, 1e-20)) for s in (sigma_s, sigma_t))
    return gamma * large + (1.0 - gamma) * small


def ddim() -> Sampler:
    """Deterministic DDIM, z_s = alpha_s x0 + (sigma_s / sigma_t)(z - alpha_t x0). First order."""

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        return _ddim_update(denoise(z, logsnr_t), z, logsnr_t, logsnr_s), state

    return Sampler(init=lambda z: (), step=step)


def _ddim_update(x0: Array, z: Array, logsnr_t: Array, logsnr_s: Array) -> Array:
    alpha_t, sigma_t = (expand(v, z) for v in alpha_sigma(logsnr_t))
    alpha_s, sigma_s = (expand(v, z) for v in alpha_sigma(logsnr_s))
    return alpha_s * x0 + (sigma_s / sigma_t) * (z - alpha_t * x0)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2): second order, one evaluation per step.

    x0 is extrapolated linearly, in logsnr, from the two last evaluations; the first step, which has
    one only, is DDIM's.
    """

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        x0, state = _extrapolate(denoise(z, logsnr_t), logsnr_t, logsnr_s, state)
        return _ddim_update(x0, z, logsnr_t, logsnr_s), state

    return Sampler(init=_no_estimate, step=step)


def dpmpp_2m_sde() -> Sampler:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, App. B): `dpmpp_2m` of the reverse SDE.

    The x0 of `dpmpp_2m`, in the ancestral step of `ddpm` with gamma = 0: for a constant x0 this
    step solves the SDE exactly.
    """

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        x0, state = _extrapolate(denoise(z, logsnr_t), logsnr_t, logsnr_s, state)
        mean, deviation = _posterior(x0, z, logsnr_t, logsnr_s)
        return mean + deviation * normal(keys, z.shape[1:]), state

    return Sampler(init=_no_estimate, step=step)


def _no_estimate(z: Array) -> tuple[Array, Array, Array]:
    return jnp.zeros_like(z), jnp.zeros(z.shape[:1]), jnp.zeros(z.shape[:1], bool)


def _extrapolate(x0: Array, logsnr_t: Array, logsnr_s: Array, state: Any) -> tuple[Array, Any]:
    """x0 in the middle of the step by the estimate before, which `state` holds; the new state."""
    previous_x0, previous_logsnr, has_previous = state
    h = logsnr_s - logsnr_t
    h_previous = jnp.where(has_previous, logsnr_t - previous_logsnr, 1.0)
    factor = jnp.where(has_previous, h / (2.0 * h_previous), 0.0)
    extrapolated = x0 + expand(factor, x0) * (x0 - previous_x0)
    return extrapolated, (x0, logsnr_t, jnp.ones_like(has_previous))


def heun(churn: float = 0.0) -> Sampler:
    """Heun's second-order method on the probability-flow ODE (arXiv:2206.00364, Algs. 1 and 2).

    In y = z / alpha and n = sigma / alpha the ODE is dy/dn = (y - x0) / n; an Euler step (which is
    DDIM) is followed by the mean of the slopes at both ends. Two evaluations per step.

    Args:
      churn: gamma of Alg. 2. Each step first raises n to (1 + gamma) n by new noise; 0: none. The
        paper's S_churn is gamma times the number of steps, at most 0.41 of it; its S_noise is 1
        here.
    """

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        alpha_t, sigma_t = (expand(v, z) for v in alpha_sigma(logsnr_t))
        alpha_s, _ = (expand(v, z) for v in alpha_sigma(logsnr_s))
        y = z / alpha_t
        if churn:
            y = y + ((1.0 + churn) ** 2 - 1.0) ** 0.5 * sigma_t / alpha_t * normal(
                keys, z.shape[1:]
            )
            logsnr_t = logsnr_t - 2.0 * jnp.log1p(churn)
            alpha_t, _ = (expand(v, z) for v in alpha_sigma(logsnr_t))
            z = alpha_t * y
        n_t, n_s = (expand(jnp.exp(-0.5 * v), z) for v in (logsnr_t, logsnr_s))
        slope = (y - denoise(z, logsnr_t)) / n_t
        euler = y + (n_s - n_t) * slope
        slope_end = (euler - denoise(alpha_s * euler, logsnr_s)) / n_s
        return alpha_s * (y + 0.5 * (n_s - n_t) * (slope + slope_end)), state

    return Sampler(init=lambda z: (), step=step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": heun,
}
STOCHASTIC = ("ddpm", "dpmpp_2m_sde")
# Fields of `SamplingConfig` that a sampler takes as keyword arguments.
OPTIONS: dict[str, tuple[str, ...]] = {"ddpm": ("gamma", "variance"), "heun": ("churn",)}


def takes_estimate(settings: SamplingConfig) -> bool:
    """Whether the sampler of `settings` needs an `Estimate` of `denoise`."""
    return settings.variance == "learned" and "variance" in OPTIONS.get(settings.sampler, ())


def takes_noise(settings: SamplingConfig) -> bool:
    """Whether the steps of the sampler of `settings` add noise."""
    return settings.sampler in STOCHASTIC or (settings.sampler == "heun" and settings.churn > 0)


def make_sampler(settings: SamplingConfig) -> Sampler:
    """The sampler that `settings.sampler` names, with its options. Raises ConfigError."""
    if settings.sampler not in SAMPLERS:
        raise ConfigError(unknown_name("config.sampling.sampler", settings.sampler, list(SAMPLERS)))
    options = {name: getattr(settings, name) for name in OPTIONS.get(settings.sampler, ())}
    return SAMPLERS[settings.sampler](**options)


class DenoisingState(NamedTuple):
    """B images between two steps.

    Attributes:
      z: [B, H, W, C] at the noise level that the last step reached.
      sampler_state: state of the sampler.
      x0: what `denoise` returned first in the last step, at the step's noisier end.
    """

    z: Array
    sampler_state: Any
    x0: Array


def init_state(sampler: Sampler, z: Float[Array, "b h w c"]) -> DenoisingState:
    """The state before the first step: z is the noise that denoising starts from."""
    return DenoisingState(z, sampler.init(z), jnp.zeros_like(z))


def denoise_steps(
    sampler: Sampler,
    denoise: Denoise,
    state: DenoisingState,
    logsnr_t: Float[Array, " n"],
    logsnr_s: Float[Array, " n"],
    keys: Key[Array, " b"] | Float[Array, "given b h w c"],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> DenoisingState:
    """The denoising loop: steps `first` up to, not including, `last`.

    The bounds may be traced, so one program runs any number of steps. After the last step of all,
    `x0` is the result: the mean, without new noise. Every step calls `sampler.step` once, so T
    steps evaluate `denoise` 2 T times with heun, and T times with the other samplers.

    Args:
      sampler: a row of SAMPLERS, built.
      denoise: (z, logsnr [B]) -> x0, or an `Estimate`.
      state: from `init_state`, or from the steps before.
      logsnr_t: noise level that each step starts from, nats; those from `last` on are not read.
      logsnr_s: noise level that each step ends at, nats.
      keys: one key per image; step i samples from fold_in(key, i). Or the noise of the steps.
      first: the first step.
      last: the step after the last one.
    """

    def body(index, state: DenoisingState) -> DenoisingState:
        estimates = []

        def recording(z, logsnr):
            estimate = denoise(z, logsnr)
            estimates.append(estimate.x0 if isinstance(estimate, Estimate) else estimate)
            return estimate

        step_keys = keys[index] if is_given(keys) else fold_in_keys(keys, index)
        ends = (jnp.broadcast_to(v[index], state.z.shape[:1]) for v in (logsnr_t, logsnr_s))
        z, inner = sampler.step(recording, state.z, *ends, step_keys, state.sampler_state)
        return DenoisingState(z, inner, estimates[0])

    return jax.lax.fori_loop(first, last, body, state)


def sample_loop(
    sampler: Sampler,
    denoise: Denoise,
    z: Float[Array, "b h w c"],
    logsnrs: Float[Array, " steps_plus_1"],
    keys: Key[Array, " b"],
) -> Float[Array, "b h w c"]:
    """All steps of `denoise_steps` along one list of noise levels.

    Args:
      sampler: a row of SAMPLERS, built.
      denoise: (z, logsnr [B]) -> x0.
      z: noise at logsnrs[0].
      logsnrs: T+1 strictly increasing values, nats, noisiest first.
      keys: one key per image; step i samples from fold_in(key, i).

    Returns:
      x0 as `denoise` predicts it in the last step: the mean, without new noise.
    """
    steps = logsnrs.shape[0] - 1
    state = init_state(sampler, z)
    return denoise_steps(sampler, denoise, state, logsnrs[:-1], logsnrs[1:], keys, 0, steps).x0
