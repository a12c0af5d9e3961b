"""Thresholding as a wrapper of `denoise`."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion import thresholding
from tests.reference import diffusion as reference

SHAPE = (3, 4, 4, 3)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
def test_dynamic_threshold(percentile):
    scales = np.array([0.2, 1.0, 5.0])[:, None, None, None]
    x0 = (np.random.default_rng(0).normal(size=SHAPE) * scales).astype(np.float32)
    got = np.asarray(thresholding.dynamic(jnp.asarray(x0), percentile))
    np.testing.assert_allclose(got, reference.dynamic_threshold(x0, percentile), atol=1e-6)
    assert np.abs(got).max() <= 1.0
    # A picture within [-1, 1] is left alone, and none sees its neighbours.
    np.testing.assert_array_equal(got[0], x0[0])
    alone = thresholding.dynamic(jnp.asarray(x0[2:]), percentile)
    np.testing.assert_array_equal(alone[0], got[2])


@pytest.mark.parametrize("percentile", [0.0, 37.3, 50.0, 99.5, 100.0])
def test_percentile_without_sorting(percentile):
    values = np.abs(np.random.default_rng(0).normal(size=(3, 7, 5, 3))).astype(np.float32)
    # Repeated values and zeros, among which ranks are ambiguous.
    values[1] = values[1].round(1)
    values[2] = 0.0
    got = thresholding.percentile_of(jnp.asarray(values), percentile)
    expected = np.percentile(values.reshape(3, -1).astype(np.float64), percentile, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_cap_of_the_dynamic_threshold():
    x0 = jnp.linspace(-8.0, 8.0, 48).reshape(1, 4, 4, 3)
    for cap, expected in [(1.0, np.clip(x0, -1, 1)), (2.0, np.clip(x0, -2, 2) / 2)]:
        np.testing.assert_allclose(thresholding.dynamic(x0, 90.0, cap), expected, atol=1e-6)
    free = thresholding.dynamic(x0, 90.0)
    np.testing.assert_array_equal(thresholding.dynamic(x0, 90.0, 100.0), free)


@pytest.mark.parametrize(("name", "largest"), [("none", 4.0), ("static", 1.0), ("dynamic", 1.0)])
def test_threshold_wraps_denoise(name, largest):
    x0 = jnp.linspace(-4.0, 4.0, np.prod(SHAPE)).reshape(SHAPE)
    settings = SamplingConfig(thresholding=name, threshold_percentile=90.0)
    got = thresholding.threshold(lambda z, logsnr: x0, settings)(x0, jnp.zeros(3))
    assert float(jnp.abs(got).max()) == pytest.approx(largest)


def test_the_cap_reaches_denoise():
    x0 = jnp.linspace(-8.0, 8.0, 48).reshape(1, 4, 4, 3)
    settings = SamplingConfig(thresholding="dynamic", threshold_percentile=90.0, threshold_cap=2.0)
    got = thresholding.threshold(lambda z, logsnr: x0, settings)(x0, jnp.zeros(1))
    np.testing.assert_allclose(got, np.clip(x0, -2, 2) / 2, atol=1e-6)
