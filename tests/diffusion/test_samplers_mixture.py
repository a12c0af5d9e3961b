"""Sampler truth: mixtures of Gaussians, whose exact denoiser is known and not linear.

The deterministic samplers are held against the solution of their ODE, the ancestral one against the
moments of the distribution it should draw.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import process, samplers
from tests.reference import diffusion as reference

SHAPE = (2, 2, 3)
RNG = np.random.default_rng(7)
SHARES = np.array([0.5, 0.3, 0.2])
MEANS = RNG.uniform(-0.8, 0.8, (3, 12))
DEVIATION = 0.25
FIRST, LAST = -4.0, 3.0


def mixture_denoiser(shares, means, deviation):
    """E[x0 | z] of pictures, for JAX; `test_the_denoiser_is_exact` holds it to the reference."""

    def denoise(z, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        alpha, variance = alpha[:, None], (alpha**2 * deviation**2 + sigma**2)[:, None]
        offset = z.reshape(len(z), 1, -1) - alpha[..., None] * means
        log_odds = jnp.log(shares) - 0.5 * jnp.sum(offset**2, axis=-1) / variance
        gain = (alpha * deviation**2 / variance)[..., None]
        x0 = jnp.sum(jax.nn.softmax(log_odds)[..., None] * (means + gain * offset), axis=1)
        return x0.reshape(z.shape)

    return denoise


DENOISE = mixture_denoiser(jnp.asarray(SHARES), jnp.asarray(MEANS, jnp.float32), DEVIATION)


def test_the_denoiser_is_exact():
    z = np.random.default_rng(0).normal(size=(64, 12))
    for logsnr in (-4.0, 0.3, 6.0):
        got = DENOISE(jnp.asarray(z, jnp.float32).reshape(-1, *SHAPE), jnp.full(64, logsnr))
        expected = reference.mixture_mean(z, logsnr, SHARES, MEANS, DEVIATION)
        np.testing.assert_allclose(got.reshape(64, 12), expected, atol=1e-5)


def grids(kind: str, steps: int) -> np.ndarray:
    """Levels of `steps` steps from FIRST to LAST, evenly in logsnr or in the schedule's time."""
    if kind == "logsnr":
        return np.linspace(FIRST, LAST, steps + 1)
    times = np.arctan(np.exp(-0.5 * np.array([FIRST, LAST]))) * 2 / np.pi
    return reference.cosine_logsnr(np.linspace(*times, steps + 1))


@pytest.fixture(scope="module")
def starts():
    """(z at FIRST, where the ODE takes it at LAST, the exact x0 there)."""
    z = np.random.default_rng(1).normal(size=(8, 12))
    end = reference.mixture_flow(z, FIRST, LAST, SHARES, MEANS, DEVIATION)
    return z, reference.mixture_mean(end, LAST, SHARES, MEANS, DEVIATION)


@pytest.mark.parametrize("grid", ["logsnr", "cosine"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_order_of_convergence(starts, name, order, grid):
    z, exact = starts
    counts, errors = np.array([32, 64, 128]), []
    run = jax.jit(
        lambda z, logsnrs: samplers.sample_loop(
            samplers.SAMPLERS[name](), DENOISE, z, logsnrs, jax.random.split(jax.random.key(0), 8)
        )
    )
    for count in counts:
        # The loop answers with x0 at the last level but one; the last one is not looked at.
        logsnrs = jnp.asarray([*grids(grid, count), 20.0], jnp.float32)
        x0 = run(jnp.asarray(z, jnp.float32).reshape(-1, *SHAPE), logsnrs)
        errors.append(np.sqrt(np.mean((np.asarray(x0).reshape(8, 12) - exact) ** 2)))
    orders = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert orders[-1] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_ancestral_sampling_converges_to_the_moments(gamma):
    """Independent pixels of a skewed mixture: the error of four moments falls as 1 / steps."""
    errors = moment_errors(samplers.ddpm(gamma), (8, 32))
    # 65,536 pixels give each moment a standard error of about .002; the errors are .09 and .02 at
    # the smaller variance, .05 and .01 at the larger one.
    assert errors[1] < 0.03
    assert np.log(errors[0] / errors[1]) / np.log(4.0) == pytest.approx(1.0, abs=0.3)


def test_second_order_of_the_sde_needs_fewer_steps():
    errors = moment_errors(samplers.dpmpp_2m_sde(), (8, 32))
    assert errors[0] < 0.03 and errors[1] < 0.01
    assert errors[0] < 0.3 * moment_errors(samplers.ddpm(), (8,))[0]


def moment_errors(sampler, counts):
    """Distance of the moments of 65,536 pixels from those of a skewed mixture, by steps."""
    shares, means, deviation = np.array([0.7, 0.3]), np.array([[-0.5], [0.7]]), 0.15
    denoise_pixel = mixture_denoiser(jnp.asarray(shares), jnp.asarray(means), deviation)
    side = 256

    def denoise(z, logsnr):
        pixels = denoise_pixel(z.reshape(-1, 1, 1, 1), jnp.repeat(logsnr, side**2))
        return pixels.reshape(z.shape)

    @jax.jit
    def run(z, logsnrs):
        keys = jax.random.split(jax.random.key(3), 1)
        return samplers.sample_loop(sampler, denoise, z, logsnrs, keys)

    z = samplers.normal(jax.random.split(jax.random.key(4), 1), (side, side, 1))
    exact, errors = exact_moments(shares, means[:, 0], deviation), []
    for steps in counts:
        logsnrs = process.logsnr_at(jnp.linspace(1.0, 0.0, steps + 1), DiffusionConfig())
        x0 = np.asarray(run(z, logsnrs), np.float64).ravel()
        errors.append(np.linalg.norm(moments(x0) - exact))
        print(f"{steps} steps: error of the moments {errors[-1]:.3f}")
    return errors


def moments(x):
    """Mean, deviation, third central moment, share of the upper mode."""
    return np.array([x.mean(), x.std(), np.mean((x - x.mean()) ** 3), np.mean(x > 0.1)])


def exact_moments(shares, means, deviation):
    """The same of the mixture, by summation over a fine grid."""
    x = np.linspace(-3.0, 3.0, 100_001)
    density = np.exp(-0.5 * ((x[:, None] - means) / deviation) ** 2) @ shares
    density /= density.sum()
    mean = density @ x
    central = [density @ (x - mean) ** power for power in (2, 3)]
    return np.array([mean, central[0] ** 0.5, central[1], density[x > 0.1].sum()])
