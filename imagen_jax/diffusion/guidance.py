"""Guidance: one estimate of x0 from a pair of them (Imagen, Sec. 2.2).

Everything acts on x0, as `denoise(z, logsnr) -> x0` and on pairs (conditional, other) of it. Papers
write guidance for eps (Imagen, Eq. 2), for EDM's denoiser D, which is x0 at the same noise, or for
v; at a fixed z each is an affine function of x0,

    eps = (z - alpha x0) / sigma,    D = x0,    v = alpha eps - sigma x0 = (alpha z - x0) / sigma,

so a combination whose weights sum to one is the same in all of them, and a difference of two
estimates is the difference of their x0 times -alpha / sigma, 1 or -1 / sigma. Only `rescale`, which
is not affine, depends on the parametrisation.

The other estimate, which guidance moves away from, is the network with the null text
(classifier-free guidance), with a negative prompt, or a weaker network (autoguidance); see
`stages.denoiser`. `guide` chains the variants, each off by default. A new one is a function here, a
field of `SamplingConfig` and a line in `guide`. One that only changes the weight with the noise
level is a row of FACTORS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion.process import alpha_sigma, expand

Denoise = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]
DenoisePair = Callable[
    [Float[Array, "b h w c"], Float[Array, " b"]],
    tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]],
]
_PIXELS = (1, 2, 3)


class Estimate(NamedTuple):
    """What `denoise` returns for a sampler with learned variance, in place of x0 alone.

    Attributes:
      x0: the clean images.
      gamma: per pixel, log variance between the smallest (0) and largest (1) of DDPM.
    """

    x0: Float[Array, "b h w c"]
    gamma: Float[Array, "b h w c"]


def guide(
    denoise_pair: DenoisePair,
    settings: SamplingConfig,
    levels: Float[Array, " steps_plus_1"],
    base_weight: Float[Array, " b"] | None = None,
) -> Denoise:
    """`denoise` from a pair of estimates, with the guidance settings of `settings`.

    Args:
      denoise_pair: gives (conditional, other) x0.
      settings: the fields guidance_*.
      levels: logsnr of all steps, noisiest first.
      base_weight: of each image, in place of `guidance_weight`.
    """

    def denoise(z: Float[Array, "b h w c"], logsnr: Float[Array, " b"]) -> Array:
        conditional, other = denoise_pair(z, logsnr)
        other = apg(conditional, other, settings.guidance_parallel, settings.guidance_norm)
        weight = weight_at(logsnr, settings, levels, base_weight)
        x0 = classifier_free(conditional, other, weight)
        return rescale(x0, conditional, settings.guidance_rescale)

    return denoise


def classifier_free(
    conditional: Float[Array, "b h w c"],
    other: Float[Array, "b h w c"],
    weight: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Classifier-free guidance (arXiv:2207.12598): x0 = w x0(z, text) + (1 - w) x0(z).

    w = 1 is off. The guidance scale s of GLIDE and Imagen is this w; Ho & Salimans' own w is
    w - 1. Negative prompt: x0(z, negative) in place of x0(z). Autoguidance (arXiv:2406.02507, Eq.
    6): D = w D_1(z, text) + (1 - w) D_0(z, text), with a smaller or less trained network D_0.

    Args:
      conditional: x0(z, text).
      other: the estimate to move away from.
      weight: w of each image, at least 0.
    """
    weight = expand(weight, conditional)
    return weight * conditional + (1.0 - weight) * other


def apg(
    conditional: Float[Array, "b h w c"],
    other: Float[Array, "b h w c"],
    parallel: float,
    norm: float,
) -> Float[Array, "b h w c"]:
    """Adaptive projected guidance (arXiv:2410.02416, Alg. 1): guidance that saturates less.

    The difference d = conditional - other is first shortened to `norm`, d <- d min(1, r / |d|),
    then split along the conditional x0 into d_par = <d, x0> x0 / |x0|^2 and d_orth = d - d_par; the
    parallel part, which mostly raises contrast and saturation, is scaled by eta. Returns
    conditional - (d_orth + eta d_par) in place of `other`. The paper also acts on D = x0. Differs
    from paper: no (negative) momentum over steps, since `denoise` has no state.

    Args:
      conditional: x0(z, text).
      other: the estimate to move away from.
      parallel: eta; 1 is off, the paper uses 0.
      norm: r, length of the longest d; 0 is off. Scale r with the square root of the number
        of pixels.
    """
    if parallel == 1.0 and norm == 0.0:
        return other
    difference = conditional - other
    if norm > 0.0:
        length = jnp.sqrt(jnp.sum(difference**2, axis=_PIXELS, keepdims=True))
        difference *= jnp.minimum(1.0, norm / jnp.maximum(length, 1e-12))
    square = jnp.sum(conditional**2, axis=_PIXELS, keepdims=True)
    along = jnp.sum(difference * conditional, axis=_PIXELS, keepdims=True)
    parallel_part = along / jnp.maximum(square, 1e-12) * conditional
    return conditional - (difference + (parallel - 1.0) * parallel_part)


def rescale(
    x0: Float[Array, "b h w c"], conditional: Float[Array, "b h w c"], share: float
) -> Float[Array, "b h w c"]:
    """Rescales the guided x0 towards the std of the conditional one (arXiv:2305.08891, Sec. 3.4).

    x0 <- phi x0 std(conditional) / std(x0) + (1 - phi) x0, std over each image (Eqs. 14-16).
    Differs from paper: it rescales the network's output, v; here x0, whose contrast guidance
    raises.

    Args:
      x0: guided images.
      conditional: x0(z, text).
      share: phi; 0 is off, the paper uses 0.7.
    """
    if share == 0.0:
        return x0
    ratio = jnp.std(conditional, axis=_PIXELS, keepdims=True) / jnp.maximum(
        jnp.std(x0, axis=_PIXELS, keepdims=True), 1e-12
    )
    return x0 * (share * ratio + (1.0 - share))


def classifier(
    denoise: Denoise,
    log_prob: Callable[[Array, Array], Float[Array, " b"]],
    scale: Float[Array, " b"] | float,
) -> Denoise:
    """Classifier guidance (arXiv:2105.05233, Alg. 2): x0 + s sigma^2 / alpha grad_z log p(c | z).

    The paper's eps - s sigma grad_z log p(c | z), converted to x0 = (z - sigma eps) / alpha. At
    s = 1 an unconditional denoiser becomes one of p(z | c) by Bayes' rule.

    Args:
      denoise: any denoiser, conditional or not, guided or not, not yet thresholded.
      log_prob: (z, logsnr) -> log p(c | z) in nats of each image's class, from a classifier
        trained on noisy images.
      scale: s, of each image or of all; 0 is off.
    """

    def guided(z: Float[Array, "b h w c"], logsnr: Float[Array, " b"]) -> Array:
        # log p of an image is independent of the others, so the sum has every image's gradient.
        gradient = jax.grad(lambda z: log_prob(z, logsnr).sum())(z)
        alpha, sigma = (expand(s, z) for s in alpha_sigma(logsnr))
        by_image = expand(jnp.broadcast_to(jnp.asarray(scale), logsnr.shape), z)
        return denoise(z, logsnr) + by_image * sigma**2 / alpha * gradient

    return guided


def weight_at(
    logsnr: Float[Array, " b"],
    settings: SamplingConfig,
    levels: Float[Array, " steps_plus_1"],
    base_weight: Float[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """w(logsnr) = 1 + (guidance_weight - 1) times every row of FACTORS.

    Args:
      logsnr: noise level of each image, nats.
      settings: the fields guidance_*.
      levels: logsnr of all steps, noisiest first.
      base_weight: in place of guidance_weight.
    """
    excess = jnp.full_like(logsnr, settings.guidance_weight - 1.0)
    if base_weight is not None:
        excess = base_weight - 1.0
    for factor in FACTORS.values():
        excess = excess * factor(logsnr, settings, levels)
    return 1.0 + excess


def scheduled(logsnr: Array, settings: SamplingConfig, levels: Array) -> Array | float:
    """A factor that is linear in logsnr between the knots of `guidance_schedule`."""
    if not settings.guidance_schedule:
        return 1.0
    knots, factors = jnp.array(settings.guidance_schedule).T
    return jnp.interp(logsnr, knots, factors)


def within_interval(logsnr: Array, settings: SamplingConfig, levels: Array) -> Array | float:
    """1 in `guidance_interval`, 0 outside (arXiv:2404.07724, Eq. 6).

    The paper's interval (sigma_lo, sigma_hi] is in EDM's sigma = exp(-logsnr / 2): logsnr from
    -2 log sigma_hi up to, but without, -2 log sigma_lo.
    """
    if not settings.guidance_interval:
        return 1.0
    low, high = settings.guidance_interval
    return ((low <= logsnr) & (logsnr < high)).astype(logsnr.dtype)


def oscillating(logsnr: Array, settings: SamplingConfig, levels: Array) -> Array | float:
    """1 for the first steps, then 0 and 1 in turn (Imagen Video, arXiv:2210.02303).

    The paper's oscillating guidance alternates between a high weight and 1. The index of a step is
    the number of noisier levels in the whole schedule, so the weight of a level is the same when
    sampling starts from a noised image and when a sampler evaluates both ends of a step.
    """
    if settings.guidance_oscillate_after < 0:
        return 1.0
    # Compared with the midpoints between levels, so that rounding does not shift the index.
    between = 0.5 * (levels[:-1] + levels[1:])
    step = jnp.searchsorted(between, logsnr)
    late = step - settings.guidance_oscillate_after
    return ((late < 0) | (late % 2 == 1)).astype(logsnr.dtype)


FACTORS: dict[str, Callable[[Array, SamplingConfig, Array], Array | float]] = {
    "schedule": scheduled,
    "interval": within_interval,
    "oscillation": oscillating,
}
