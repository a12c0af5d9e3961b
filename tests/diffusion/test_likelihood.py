"""The variational bound against sums over 8-bit values, scipy's quadrature and an exact case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import likelihood, process, samplers

CONFIG = DiffusionConfig(schedule="cosine_steps")


@pytest.mark.parametrize(("difference", "q", "p"), [(0.3, -1.0, 0.5), (0.0, 0.2, 0.2), (2, 1, -1)])
def test_kl_is_the_integral(difference, q, p):
    first, second = (stats.norm(m, np.exp(0.5 * v)) for m, v in ((difference, q), (0.0, p)))
    expected, _ = integrate.quad(
        lambda x: first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), -20, 20
    )
    found = likelihood.gaussian_kl(*(jnp.float32(v) for v in (difference, q, p)))
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.02), (-0.999, 0.3), (1.4, 0.5)])
def test_probabilities_of_the_levels_sum_to_one(mean, deviation):
    levels = jnp.asarray(np.arange(256) * 2 / 255 - 1, jnp.float32)
    log_variance = jnp.full(256, 2 * np.log(deviation), jnp.float32)
    nll = likelihood.discretized_nll(levels, jnp.full(256, mean, jnp.float32), log_variance)
    assert float(jnp.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-4)
    near = int(np.argmin(np.abs(np.asarray(levels) - mean)))
    assert int(jnp.argmin(nll)) == near or abs(mean) > 0.99


def images(seed=0, size=8, count=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (count, size, size, 3)) * 2 / 255 - 1, jnp.float32)


def test_a_perfect_step_has_no_divergence():
    """The posterior is reached with the true x0 and gamma 0; every other gamma costs."""
    x0, time = images(), jnp.array([0.002, 0.01, 0.1, 0.5])
    zero = likelihood.step_bound(x0, x0, jnp.zeros_like(x0), time, CONFIG)
    np.testing.assert_allclose(zero, 0.0, atol=1e-5)
    assert (likelihood.step_bound(x0, x0, jnp.ones_like(x0), time, CONFIG) > 0).all()


def test_the_best_gamma_is_that_of_the_error():
    """KL in the log variance is least where it equals the mean square of the error (Bao 2022)."""
    x0, time = images(), jnp.full(4, 0.05)
    x0_hat = x0 + 0.2
    gammas = np.linspace(0.0, 1.0, 101)
    bounds = [likelihood.step_bound(x0, x0_hat, jnp.full_like(x0, g), time, CONFIG) for g in gammas]
    best = gammas[int(np.argmin([float(b.mean()) for b in bounds]))]
    logsnr_t, logsnr_s = (process.logsnr_at(jnp.float32(t), CONFIG) for t in (0.05, 0.049))
    (alpha_s, sigma_s), (_, sigma_t) = map(process.alpha_sigma, (logsnr_s, logsnr_t))
    r = jnp.exp(logsnr_t - logsnr_s)
    small, large = (1 - r) * sigma_s**2, (1 - r) * sigma_t**2
    target = small + (0.2 * (1 - r) * alpha_s) ** 2
    expected = float(jnp.log(target / small) / jnp.log(large / small))
    assert best == pytest.approx(np.clip(expected, 0, 1), abs=0.011)


def test_learned_variance_spans_the_fixed_ones():
    """gamma 0 and 1 are the variances of the fixed sampler (Ho et al. 2020)."""
    logsnr_t, logsnr_s = jnp.array([-2.0, 1.0]), jnp.array([-1.5, 3.0])
    z, keys = images(count=2), jax.random.split(jax.random.key(0), 2)
    for gamma in (0.0, 0.4, 1.0):
        fixed, _ = samplers.ddpm(gamma).step(
            lambda z, logsnr: 0.3 * z, z, logsnr_t, logsnr_s, keys, ()
        )
        log_variance = samplers.learned_log_variance(jnp.full_like(z, gamma), logsnr_t, logsnr_s)
        mean, _ = samplers.ddpm(gamma).step(
            lambda z, logsnr: 0.3 * z, z, logsnr_t, logsnr_s, jnp.zeros_like(z), ()
        )
        noise = samplers.normal(keys, z.shape[1:])
        np.testing.assert_allclose(fixed, mean + jnp.exp(0.5 * log_variance) * noise, atol=1e-5)


def test_the_whole_bound_of_a_gaussian_is_its_entropy():
    """x0 of one value, known exactly: only the first step costs, and it costs -log p(x0)."""
    x0 = jnp.zeros((1, 1, 1, 1)) + 1 / 255
    times = (jnp.arange(1000) + 0.5) / 1000
    shape = (1000, 1, 1, 1)
    bound = likelihood.step_bound(
        jnp.broadcast_to(x0, shape), jnp.broadcast_to(x0, shape), jnp.zeros(shape), times, CONFIG
    )
    assert float(bound[1:].max()) < 1e-4
    assert 0 <= float(bound[0]) < 1.0
