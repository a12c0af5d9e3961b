"""Grids of noise levels against their formulas, and the schedules they are visited on."""

import dataclasses

import jax
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config, DiffusionConfig
from imagen_jax.diffusion import timesteps
from imagen_jax.inference.stage_sampler import noise_levels


def levels(spacing, steps, **diffusion):
    settings = SamplingConfig(spacing=spacing, steps=steps)
    return np.asarray(timesteps.step_levels(settings, DiffusionConfig(**diffusion)), np.float64)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("diffusion", [{}, {"schedule": "linear"}, {"logsnr_shift": -3.0}])
def test_karras_levels_are_edms(steps, diffusion):
    """arXiv:2206.00364, Eq. 5, in sigma; a schedule that ends earlier is visited to its end."""
    ends = levels("time", 1, **diffusion)
    low, high = max(ends[0], -2 * np.log(80.0)), min(ends[-1], -2 * np.log(0.002))
    largest, smallest = np.exp(-0.5 * np.array([low, high])) ** (1 / 7)
    ramp = np.arange(steps + 1) / steps
    sigmas = (largest + ramp * (smallest - largest)) ** 7
    np.testing.assert_allclose(
        np.exp(-0.5 * levels("karras", steps, **diffusion)), sigmas, rtol=2e-3
    )


@pytest.mark.parametrize("diffusion", [{}, {"schedule": "linear"}, {"logsnr_shift": -3.0}])
def test_even_levels_differ_by_the_same(diffusion):
    found = np.diff(levels("logsnr", 20, **diffusion))
    np.testing.assert_allclose(found, found.mean(), atol=5e-3)


@pytest.mark.parametrize("spacing", list(timesteps.GRIDS))
def test_steps_and_denoiser_see_the_same_levels(spacing):
    config = Config(sampling=SamplingConfig(spacing=spacing, steps=9))
    found = noise_levels(config)
    expected = levels(spacing, 9)
    assert found.count == 9
    np.testing.assert_allclose(found.logsnr_t[:9], expected[:-1], rtol=1e-6)
    np.testing.assert_allclose(found.logsnr_s[:9], expected[1:], rtol=1e-6)


@pytest.mark.parametrize("spacing", list(timesteps.GRIDS))
def test_a_compiled_program_sees_the_same_levels(spacing):
    """Previews, exported programs, oscillating guidance and teachers ask for them in a program."""
    settings, diffusion = SamplingConfig(spacing=spacing, steps=9), DiffusionConfig()
    found = jax.jit(lambda: timesteps.step_levels(settings, diffusion))()
    np.testing.assert_allclose(found, levels(spacing, 9), rtol=1e-6)


@pytest.mark.parametrize("spacing", list(timesteps.GRIDS))
def test_an_edit_takes_the_last_steps(spacing):
    config = Config(sampling=SamplingConfig(spacing=spacing, steps=10))
    whole, part = noise_levels(config), noise_levels(config, 0.3)
    assert part.count == 3
    np.testing.assert_array_equal(part.logsnr_t[:3], whole.logsnr_t[7:10])


@pytest.mark.parametrize("churn", [-0.1, 1.5, float("nan")])
def test_churn_is_refused_outside_its_range(churn):
    with pytest.raises(ConfigError, match=r"config\.sampling\.churn=.* within 0\.\.1"):
        dataclasses.replace(SamplingConfig(), churn=churn)
