"""The maths of the process against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import process
from tests.reference import diffusion as reference

LOGSNR = np.array([-20.0, -9.0, -3.0, -0.5, 0.0, 1.0, 4.0, 10.0, 20.0])


def test_cosine_schedule_is_the_papers():
    t = np.linspace(0.001, 0.999, 41)
    got = process.cosine_logsnr(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(got, reference.cosine_logsnr(t), atol=2e-3)


def test_linear_schedule_is_the_limit_of_the_thousand_steps():
    t = np.arange(1, 1001) / 1000
    got = np.asarray(process.linear_logsnr(jnp.asarray(t, jnp.float32)))
    # The continuous form leaves out beta^2 / 2 in log(1 - beta): at most 1% of logsnr's slope.
    np.testing.assert_allclose(got[9:], reference.discrete_linear_logsnr()[9:], atol=0.15)


@pytest.mark.parametrize("schedule", list(process.SCHEDULES))
@pytest.mark.parametrize("shift", [-1.4, 0.0, 2.0])
def test_logsnr_falls_and_is_finite_at_both_ends(schedule, shift):
    config = DiffusionConfig(schedule=schedule, logsnr_shift=shift)
    for at in (process.logsnr_at, jax.jit(process.logsnr_at, static_argnums=1)):
        logsnr = np.asarray(at(jnp.linspace(0.0, 1.0, 257), config))
        assert np.isfinite(logsnr).all()
        assert (np.diff(logsnr) <= 0).all()
        assert logsnr[0] > 6 and logsnr[-1] < -6
        assert logsnr.min() >= config.logsnr_min and logsnr.max() <= config.logsnr_max


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_aug_level_goes_from_clean_to_noise_whatever_the_shift(schedule):
    config = DiffusionConfig(aug_schedule=schedule, logsnr_shift=3.0)
    low, middle, high = np.asarray(process.aug_logsnr(jnp.array([0.0, 0.2, 1.0]), config))
    # The two levels of PAPER: an SNR of 9.5 under cosine, of 1.9 under linear.
    assert np.exp(middle) == pytest.approx({"cosine": 9.5, "linear": 1.9}[schedule], rel=0.03)
    assert low == 20.0 and high < -9.0


def test_aug_level_of_the_discrete_schedule_is_its_timestep():
    """Nichol & Dhariwal 2021, Eq. 17: level 0.2 is timestep 200, after 201 of the 1000 betas."""
    config = DiffusionConfig(aug_schedule="cosine_steps", logsnr_shift=3.0)
    low, middle, high = np.asarray(process.aug_logsnr(jnp.array([0.0, 0.2, 1.0]), config))

    def signal(t: float) -> float:
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2

    assert np.exp(middle) == pytest.approx(signal(0.201) / (1 - signal(0.201)), rel=1e-3)
    assert np.exp(low) == pytest.approx(signal(0.001) / (1 - signal(0.001)), rel=1e-2)
    assert high < -9.0


def test_scales_are_variance_preserving():
    alpha, sigma = (np.asarray(s, np.float64) for s in process.alpha_sigma(jnp.asarray(LOGSNR)))
    expected_alpha, expected_sigma = reference.scales(LOGSNR)
    np.testing.assert_allclose(alpha, expected_alpha, rtol=1e-6)
    np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)


@pytest.fixture(scope="module")
def pictures():
    """(x0, eps, z, targets by name) at every level of LOGSNR, float64."""
    rng = np.random.default_rng(0)
    x0 = rng.uniform(-1, 1, (len(LOGSNR), 4, 4, 3))
    eps = rng.normal(size=x0.shape)
    return x0, eps, *reference.predictions(x0, eps, LOGSNR)


def single(x):
    return jnp.asarray(x, jnp.float32)


def test_noising_and_targets(pictures):
    x0, eps, z, targets = pictures
    got = process.q_sample(single(x0), single(LOGSNR), single(eps))
    np.testing.assert_allclose(got, z, atol=1e-6)
    for name, target in targets.items():
        got = process.prediction_target(name, x0=single(x0), eps=single(eps), logsnr=single(LOGSNR))
        np.testing.assert_allclose(got, target, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_gives_back_x0_and_eps(prediction, pictures):
    x0, eps, z, targets = pictures
    alpha, sigma = (s[:, None, None, None] for s in reference.scales(LOGSNR))
    z, logsnr = single(z), single(LOGSNR)
    got = process.to_x0(prediction, single(targets[prediction]), z=z, logsnr=logsnr)
    # float32 rounds z; dividing by alpha (eps-prediction) magnifies that rounding by 1 / alpha.
    scale = 1 / alpha if prediction == "eps" else 1.0
    assert (np.abs(got - x0) <= 2e-6 * scale).all()
    got = process.to_eps(single(x0), z=z, logsnr=logsnr)
    assert (np.abs(got - eps) <= 2e-6 / sigma).all()


@pytest.mark.parametrize("name", list(process.LOSS_WEIGHTS))
def test_a_weighted_loss_is_the_same_whatever_the_network_predicts(name, pictures):
    x0, eps, z, _ = pictures
    alpha, sigma = (s[:, None, None, None] for s in reference.scales(LOGSNR))
    wrong_x0 = x0 + np.random.default_rng(1).normal(size=x0.shape)
    wrong_eps = (z - alpha * wrong_x0) / sigma
    wrong = reference.predictions(wrong_x0, wrong_eps, LOGSNR)[1]
    right = reference.predictions(x0, eps, LOGSNR)[1]
    losses = {
        prediction: np.asarray(process.output_loss_weight(name, prediction, single(LOGSNR)))
        * np.mean((wrong[prediction] - right[prediction]) ** 2, axis=(1, 2, 3))
        for prediction in ("eps", "x0", "v")
    }
    np.testing.assert_allclose(losses["eps"], losses["x0"], rtol=1e-5)
    np.testing.assert_allclose(losses["v"], losses["x0"], rtol=1e-5)
    if name in losses:
        plain = np.mean((wrong[name] - right[name]) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(losses["x0"], plain, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_table(prediction):
    got = process.output_loss_weight("min_snr", prediction, single(LOGSNR))
    np.testing.assert_allclose(got, reference.min_snr_weight(prediction, np.exp(LOGSNR)), rtol=1e-5)


def test_the_type_checker_is_on():
    with pytest.raises(Exception, match="imagen_jax.diffusion.process.q_sample"):
        process.q_sample(jnp.zeros((2, 4)), jnp.zeros(3), jnp.zeros((2, 4)))
