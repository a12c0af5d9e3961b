"""Samplers as (init, step) pairs, and the one loop that runs any of them.

A sampler sees `denoise(z, logsnr) -> x0` and a decreasing amount of noise, nothing else; what is in
`denoise` (guidance, thresholding, conditioning) is none of its business. A new sampler is one
function here and one row in SAMPLERS. Times run from logsnr_t (noisier) to logsnr_s (cleaner).

Every picture draws its noise from its own key, so it does not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from imagen_jax.diffusion.guidance import Denoise
from imagen_jax.diffusion.process import alpha_sigma, expand


class Sampler(NamedTuple):
    """A sampler; the shape of optax.GradientTransformation.

    Attributes:
      init: z -> sampler state.
      step: (denoise, z, logsnr_t [B], logsnr_s [B], keys [B], state) -> (z at logsnr_s, state).
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]


def fold(keys: Key[Array, " b"], number: Integer[Array, ""] | int) -> Key[Array, " b"]:
    """`jax.random.fold_in` of each of the keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Standard normal noise, picture i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def ddpm(gamma: float = 0.0) -> Sampler:
    """Ancestral sampling from q(z_s | z_t, x0) (Ho et al. 2020; Imagen, App. A).

    mean = r (alpha_s / alpha_t) z + (1 - r) alpha_s x0, with r = exp(logsnr_t - logsnr_s);
    variance = ((1 - r) sigma_s^2)^(1 - gamma) ((1 - r) sigma_t^2)^gamma.

    Args:
      gamma: 0 is the smaller variance (that of the posterior), 1 the larger. Paper is silent on
        the value it used.
    """

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        x0 = denoise(z, logsnr_t)
        alpha_t, sigma_t = (expand(v, z) for v in alpha_sigma(logsnr_t))
        alpha_s, sigma_s = (expand(v, z) for v in alpha_sigma(logsnr_s))
        r = expand(jnp.exp(logsnr_t - logsnr_s), z)
        # 1 - r, but exact where the two levels are close.
        one_minus_r = expand(-jnp.expm1(logsnr_t - logsnr_s), z)
        mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x0
        deviation = jnp.sqrt(one_minus_r) * sigma_s ** (1.0 - gamma) * sigma_t**gamma
        return mean + deviation * normal(keys, z.shape[1:]), state

    return Sampler(init=lambda z: (), step=step)


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

    def init(z):
        return jnp.zeros_like(z), jnp.zeros(z.shape[:1]), jnp.zeros(z.shape[:1], bool)

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        previous_x0, previous_logsnr, has_previous = state
        x0 = denoise(z, logsnr_t)
        h = logsnr_s - logsnr_t
        h_previous = logsnr_t - previous_logsnr
        factor = jnp.where(has_previous, h / (2.0 * jnp.where(has_previous, h_previous, 1.0)), 0.0)
        extrapolated = x0 + expand(factor, z) * (x0 - previous_x0)
        z = _ddim_update(extrapolated, z, logsnr_t, logsnr_s)
        return z, (x0, logsnr_t, jnp.ones_like(has_previous))

    return Sampler(init=init, step=step)


def heun() -> Sampler:
    """Heun's second-order method on the probability-flow ODE (arXiv:2206.00364, Alg. 1).

    In y = z / alpha and n = sigma / alpha the ODE is dy/dn = (y - x0) / n; an Euler step (which is
    DDIM) is followed by the mean of the slopes at both ends. Two evaluations per step.
    """

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        alpha_t, _ = (expand(v, z) for v in alpha_sigma(logsnr_t))
        alpha_s, _ = (expand(v, z) for v in alpha_sigma(logsnr_s))
        n_t, n_s = (expand(jnp.exp(-0.5 * v), z) for v in (logsnr_t, logsnr_s))
        y = z / alpha_t
        slope = (y - denoise(z, logsnr_t)) / n_t
        euler = y + (n_s - n_t) * slope
        slope_end = (euler - denoise(alpha_s * euler, logsnr_s)) / n_s
        return alpha_s * (y + 0.5 * (n_s - n_t) * (slope + slope_end)), state

    return Sampler(init=lambda z: (), step=step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
}


def sample_loop(
    sampler: Sampler,
    denoise: Denoise,
    z: Float[Array, "b h w c"],
    logsnrs: Float[Array, " steps_plus_1"],
    keys: Key[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Denoises z along `logsnrs` in one `lax.scan`.

    Args:
      sampler: a row of SAMPLERS, built.
      denoise: (z, logsnr [B]) -> x0.
      z: noise at logsnrs[0].
      logsnrs: T+1 strictly increasing values, noisiest first.
      keys: one key per picture; step i draws from fold_in(key, i).

    Returns:
      x0 as `denoise` sees it at the last level: the mean, without new noise.
    """

    def body(carry, step_input):
        z, state = carry
        index, logsnr_t, logsnr_s = step_input
        step_keys = fold(keys, index)
        levels = (jnp.broadcast_to(v, z.shape[:1]) for v in (logsnr_t, logsnr_s))
        return sampler.step(denoise, z, *levels, step_keys, state), None

    # The interval before the last would end in the clipped level; there x0 itself is the answer.
    steps = jnp.arange(logsnrs.shape[0] - 2)
    (z, _), _ = jax.lax.scan(body, (z, sampler.init(z)), (steps, logsnrs[:-2], logsnrs[1:-1]))
    return denoise(z, jnp.broadcast_to(logsnrs[-2], z.shape[:1]))


class Denoising(NamedTuple):
    """B pictures between two steps.

    Attributes:
      z: [B, H, W, C] at the level reached.
      state: of the sampler.
      x0: what `denoise` answered in the last step, at its noisier end.
    """

    z: Array
    state: Any
    x0: Array


def denoise_steps(
    sampler: Sampler,
    denoise: Denoise,
    at: Denoising,
    logsnr_t: Float[Array, " n"],
    logsnr_s: Float[Array, " n"],
    keys: Key[Array, " b"],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> Denoising:
    """A part of `sample_loop`, whose bounds may be traced: one program for any number of steps.

    After step T - 1 of T, x0 is what `sample_loop` returns.

    Args:
      sampler: a row of SAMPLERS, built.
      denoise: (z, logsnr [B]) -> x0.
      at: where the pictures are.
      logsnr_t: level that each step starts from; those from `last` on are not looked at.
      logsnr_s: level that each step leads to.
      keys: one key per picture; step i draws from fold_in(key, i).
      first: the first step.
      last: the step after the last one.
    """

    def body(index, at: Denoising) -> Denoising:
        answers = []

        def noting(z, logsnr):
            answers.append(denoise(z, logsnr))
            return answers[-1]

        step_keys = fold(keys, index)
        ends = (jnp.broadcast_to(v[index], at.z.shape[:1]) for v in (logsnr_t, logsnr_s))
        z, state = sampler.step(noting, at.z, *ends, step_keys, at.state)
        return Denoising(z, state, answers[0])

    return jax.lax.fori_loop(first, last, body, at)
