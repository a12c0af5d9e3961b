"""Guidance and thresholding as wrappers of `denoise`."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import guidance
from tests.reference import diffusion as reference

Z = jnp.zeros((3, 4, 4, 3))
LOGSNR = jnp.zeros(3)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=Z.shape), jnp.float32) for _ in range(2))


def test_weight_one_is_the_conditional_network(pair):
    got = guidance.classifier_free(lambda z, logsnr: pair, 1.0)(Z, LOGSNR)
    np.testing.assert_array_equal(got, pair[0])


def test_weight_zero_is_the_unconditional_network(pair):
    got = guidance.classifier_free(lambda z, logsnr: pair, 0.0)(Z, LOGSNR)
    np.testing.assert_array_equal(got, pair[1])


def test_guiding_x0_is_guiding_eps(pair):
    conditional, unconditional = (np.asarray(x, np.float64) for x in pair)
    z = np.random.default_rng(1).normal(size=Z.shape)
    alpha, sigma = reference.scales(0.7)
    eps = [(z - alpha * x) / sigma for x in (conditional, unconditional)]
    guided_eps = 3.0 * eps[0] - 2.0 * eps[1]
    got = guidance.classifier_free(lambda z, logsnr: pair, 3.0)(Z, LOGSNR)
    np.testing.assert_allclose(got, (z - sigma * guided_eps) / alpha, atol=1e-5)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
def test_dynamic_threshold(percentile):
    scales = np.array([0.2, 1.0, 5.0])[:, None, None, None]
    x0 = (np.random.default_rng(0).normal(size=Z.shape) * scales).astype(np.float32)
    got = np.asarray(guidance.dynamic_threshold(jnp.asarray(x0), percentile))
    np.testing.assert_allclose(got, reference.dynamic_threshold(x0, percentile), atol=1e-6)
    assert np.abs(got).max() <= 1.0
    # A picture within [-1, 1] is left alone, and none sees its neighbours.
    np.testing.assert_array_equal(got[0], x0[0])
    alone = guidance.dynamic_threshold(jnp.asarray(x0[2:]), percentile)
    np.testing.assert_array_equal(alone[0], got[2])


@pytest.mark.parametrize(("name", "largest"), [("none", 4.0), ("static", 1.0), ("dynamic", 1.0)])
def test_threshold_wraps_denoise(name, largest):
    x0 = jnp.linspace(-4.0, 4.0, Z.size).reshape(Z.shape)
    got = guidance.threshold(lambda z, logsnr: x0, name, 90.0)(Z, LOGSNR)
    assert float(jnp.abs(got).max()) == pytest.approx(largest)
