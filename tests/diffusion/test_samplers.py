"""Samplers on data whose exact denoiser is known: N(M, C^2) for every pixel.

Their orders of convergence are in test_sampling_mixture.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import process, samplers
from tests.reference import diffusion as reference

M, C = 0.3, 0.5
SHAPE = (4, 4, 3)


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


def denoise(z, logsnr):
    alpha, sigma = (process.expand(s, z) for s in process.alpha_sigma(logsnr))
    return M + alpha * C**2 / (alpha**2 * C**2 + sigma**2) * (z - alpha * M)


def draw(name, logsnrs, z, **options):
    run = jax.jit(
        lambda z: samplers.sample_loop(
            samplers.SAMPLERS[name](**options),
            denoise,
            z,
            jnp.asarray(logsnrs, jnp.float32),
            keys(len(z)),
        )
    )
    return np.asarray(run(z))


def test_the_denoiser_of_these_tests_is_exact():
    z = np.random.default_rng(0).normal(size=(3, *SHAPE))
    got = denoise(jnp.asarray(z, jnp.float32), jnp.full(3, 0.7))
    np.testing.assert_allclose(got, reference.gaussian_mean(z, 0.7, M, C), atol=1e-6)


@pytest.mark.parametrize("name", list(samplers.SAMPLERS))
@pytest.mark.parametrize("schedule", list(process.SCHEDULES))
def test_whole_schedules_give_the_datas_distribution(name, schedule):
    times = jnp.linspace(1.0, 0.0, 301)
    logsnrs = process.logsnr_at(times, DiffusionConfig(schedule=schedule))
    x0 = draw(name, logsnrs, samplers.normal(keys(512), SHAPE))
    # 24,576 independent pixels: standard errors .0032 of the mean and .0023 of the deviation; the
    # rest is the error of 300 steps.
    assert x0.mean() == pytest.approx(M, abs=0.01)
    assert x0.std() == pytest.approx(C, rel=0.03)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ancestral_sampling_at_either_variance(gamma):
    times = jnp.linspace(1.0, 0.0, 301)
    logsnrs = process.logsnr_at(times, DiffusionConfig())
    x0 = draw("ddpm", logsnrs, samplers.normal(keys(512), SHAPE), gamma=gamma)
    assert x0.mean() == pytest.approx(M, abs=0.01)
    assert x0.std() == pytest.approx(C, rel=0.02)
    standard = np.sort((x0.ravel() - M) / C)
    # Quantiles of the normal distribution at 2.5, 16, 50, 84 and 97.5 percent.
    got = np.quantile(standard, [0.025, 0.1587, 0.5, 0.8413, 0.975])
    np.testing.assert_allclose(got, [-1.96, -1.0, 0.0, 1.0, 1.96], atol=0.05)


@pytest.mark.parametrize("churn", [0.05, 0.4])
def test_churn_is_the_papers_algorithm(churn):
    """arXiv:2206.00364, Alg. 2, in its own variables: sigma and x = z / alpha."""
    logsnrs = np.array([-8.0, -3.0, 0.0, 2.0, 6.0])
    sigmas, z = np.exp(-0.5 * logsnrs), np.random.default_rng(0).normal(size=(2, *SHAPE))
    x = z * np.sqrt(1.0 + sigmas[0] ** 2)

    def denoiser(x, sigma):
        z = x / np.sqrt(1.0 + sigma**2)
        return reference.gaussian_mean(z, -2.0 * np.log(sigma), M, C)

    for step in range(4):
        noise = samplers.normal(samplers.fold_in_keys(keys(2), step), SHAPE)
        raised = sigmas[step] * (1.0 + churn)
        x = x + np.sqrt(raised**2 - sigmas[step] ** 2) * np.asarray(noise, np.float64)
        x0 = denoiser(x, raised)
        slope = (x - x0) / raised
        end = x + (sigmas[step + 1] - raised) * slope
        slope_end = (end - denoiser(end, sigmas[step + 1])) / sigmas[step + 1]
        x = x + (sigmas[step + 1] - raised) * 0.5 * (slope + slope_end)
    got = draw("heun", logsnrs, jnp.asarray(z, jnp.float32), churn=churn)
    # The result is x0 as first seen in the last step.
    np.testing.assert_allclose(got, x0, atol=2e-5)


def test_ancestral_sampling_draws_anew_at_every_step_and_picture():
    logsnrs = jnp.array([-3.0, -1.0, 1.0, 20.0])
    z = jnp.zeros((2, *SHAPE))
    x0 = draw("ddpm", logsnrs, z)
    assert np.abs(x0[0] - x0[1]).max() > 0.1
    assert np.abs(x0 - draw("ddpm", logsnrs, z, gamma=1.0)).max() > 0.01
    np.testing.assert_array_equal(x0, draw("ddpm", logsnrs, z))


@pytest.mark.parametrize("churn", [0.0, 0.2])
@pytest.mark.parametrize("name", list(samplers.SAMPLERS))
def test_samplers_that_add_noise(name, churn):
    settings = SamplingConfig(sampler=name, churn=churn)
    sampler, z = samplers.make_sampler(settings), jnp.ones((2, *SHAPE))
    first, second = (
        sampler.step(
            lambda z, logsnr: 0.5 * z,
            z,
            jnp.full(2, -1.0),
            jnp.full(2, 1.0),
            jnp.full_like(z, noise),
            sampler.init(z),
        )[0]
        for noise in (-1.0, 1.0)
    )
    assert bool((first != second).all()) == samplers.takes_noise(settings)
    assert bool((first != second).any()) == samplers.takes_noise(settings)


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    many = samplers.normal(keys(5), SHAPE)
    for i in range(5):
        np.testing.assert_array_equal(samplers.normal(keys(5)[i : i + 1], SHAPE)[0], many[i])
    assert len(np.unique(np.asarray(many))) > 0.99 * many.size


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("ddpm", lambda n: n), ("ddim", lambda n: n), ("dpmpp_2m", lambda n: n),
     ("dpmpp_2m_sde", lambda n: n), ("heun", lambda n: 2 * n)],
)  # fmt: skip
def test_evaluations_of_the_network(name, evaluations, steps):
    levels = []

    def counted(z, logsnr):
        jax.debug.callback(lambda level: levels.append(float(level)), logsnr[0])
        return denoise(z, logsnr)

    logsnrs = jnp.linspace(-5.0, 5.0, steps + 1)
    z = jnp.ones((1, 2, 2, 3))
    samplers.sample_loop(samplers.SAMPLERS[name](), counted, z, logsnrs, keys(1))
    jax.effects_barrier()
    assert len(levels) == evaluations(steps)
    # A one-evaluation sampler never evaluates the clean end; Heun evaluates both ends of a step.
    evaluated = logsnrs if name == "heun" else logsnrs[:-1]
    np.testing.assert_allclose(sorted(set(levels)), evaluated, atol=1e-6)
