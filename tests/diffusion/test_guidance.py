"""Guidance: what becomes of a pair of estimates, each variant against its paper's own form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion import guidance, process
from tests.reference import diffusion as reference

SHAPE = (3, 4, 4, 3)
Z = jnp.zeros(SHAPE)
LEVELS = jnp.array([-8.0, -5.0, -3.0, -1.0, 0.5, 2.0, 4.0, 9.0])  # of seven steps


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))


def guided(pair, logsnr=0.0, **settings):
    """x0 that `guide` makes of the pair."""
    settings = SamplingConfig(**settings)
    denoise = guidance.guide(lambda z, logsnr: pair, settings, LEVELS)
    return np.asarray(denoise(Z, jnp.full(3, logsnr)))


@pytest.mark.parametrize(("weight", "which"), [(1.0, 0), (0.0, 1)])
def test_weights_one_and_zero_are_the_networks_themselves(pair, weight, which):
    np.testing.assert_array_equal(guided(pair, guidance_weight=weight), pair[which])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guiding_x0_is_guiding_eps_or_v(pair, prediction):
    z = np.random.default_rng(1).normal(size=SHAPE)
    alpha, sigma = reference.scales(0.7)
    eps = [(z - alpha * np.asarray(x, np.float64)) / sigma for x in pair]
    if prediction == "eps":
        answer = 3.0 * eps[0] - 2.0 * eps[1]
        expected = (z - sigma * answer) / alpha
    else:
        v = [alpha * e - sigma * np.asarray(x) for e, x in zip(eps, pair, strict=True)]
        expected = alpha * z - sigma * (3.0 * v[0] - 2.0 * v[1])
    np.testing.assert_allclose(guided(pair, guidance_weight=3.0), expected, atol=1e-5)


def test_schedule_is_linear_between_its_knots(pair):
    settings = {"guidance_weight": 5.0, "guidance_schedule": ((-4.0, 0.0), (0.0, 1.0), (4.0, 0.5))}
    for logsnr, weight in [
        (-9.0, 1.0),
        (-4.0, 1.0),
        (-3.0, 2.0),
        (0.0, 5.0),
        (2.0, 4.0),
        (9.0, 3.0),
    ]:
        guidance_there = weight * pair[0] + (1.0 - weight) * pair[1]
        np.testing.assert_allclose(guided(pair, logsnr, **settings), guidance_there, atol=1e-5)


def test_interval_is_off_outside(pair):
    settings = {"guidance_weight": 5.0, "guidance_interval": (-1.0, 2.0)}
    everywhere = guided(pair, guidance_weight=5.0)
    for logsnr in (-1.0, 0.0, 1.99):
        np.testing.assert_array_equal(guided(pair, logsnr, **settings), everywhere)
    for logsnr in (-1.01, 2.0, 7.0):
        np.testing.assert_array_equal(guided(pair, logsnr, **settings), pair[0])


@pytest.mark.parametrize(
    ("after", "on"),
    [(-1, "1111111"), (0, "0101010"), (1, "1010101"), (3, "1110101"), (9, "1111111")],
)
def test_oscillation_goes_by_the_step(pair, after, on):
    everywhere = guided(pair, guidance_weight=5.0)
    for step, flag in enumerate(on):
        got = guided(pair, float(LEVELS[step]), guidance_weight=5.0, guidance_oscillate_after=after)
        np.testing.assert_array_equal(got, everywhere if flag == "1" else pair[0])


def test_factors_multiply_and_each_picture_has_its_own_level(pair):
    settings = SamplingConfig(
        guidance_weight=3.0,
        guidance_schedule=((-4.0, 0.0), (4.0, 1.0)),
        guidance_interval=(-2.0, 3.0),
        guidance_oscillate_after=4,
    )
    logsnr = jnp.array([-5.0, -1.0, 0.5, 2.0, 4.0])  # steps 1, 3, 4, 5 and 6
    weights = guidance.weight_at(logsnr, settings, LEVELS)
    np.testing.assert_allclose(weights, [1.0, 1.0 + 2 * 3 / 8, 1.0, 1.0 + 2 * 6 / 8, 1.0])


def test_rescale_keeps_the_deviation(pair):
    scaled = (2.0 * pair[0] + 0.3, pair[1])
    for share in (0.0, 0.7, 1.0):
        got = guided(scaled, guidance_weight=4.0, guidance_rescale=share)
        plain = guided(scaled, guidance_weight=4.0)
        deviations = [np.std(x, axis=(1, 2, 3)) for x in (got, plain, scaled[0])]
        np.testing.assert_allclose(
            deviations[0], (1 - share) * deviations[1] + share * deviations[2], rtol=1e-5
        )


def test_apg_is_the_papers_algorithm(pair):
    """The difference, shortened, split along the conditional picture; picture by picture."""
    weight, parallel, norm = 4.0, 0.25, 3.0
    expected = []
    for conditional, other in zip(*(np.asarray(x, np.float64) for x in pair), strict=True):
        difference = conditional - other
        length = np.linalg.norm(difference)
        assert length > norm
        difference *= norm / length
        unit = conditional / np.linalg.norm(conditional)
        along = np.vdot(difference, unit) * unit
        expected.append(conditional + (weight - 1) * (difference - along + parallel * along))
    settings = {"guidance_weight": weight, "guidance_parallel": parallel, "guidance_norm": norm}
    np.testing.assert_allclose(guided(pair, **settings), expected, atol=1e-5)
    # A longer limit than the difference is none, and with all of the parallel part it is off.
    plain = guided(pair, guidance_weight=weight)
    off = guided(pair, guidance_weight=weight, guidance_norm=1e3)
    np.testing.assert_allclose(off, plain, atol=1e-5)


def test_without_its_parallel_part_guidance_is_orthogonal(pair):
    change = guided(pair, guidance_weight=4.0, guidance_parallel=0.0) - pair[0]
    along = np.sum(change * np.asarray(pair[0]), axis=(1, 2, 3))
    np.testing.assert_allclose(along, 0.0, atol=1e-3)
    assert np.abs(change).max() > 0.1


def test_pictures_without_contrast_stay_finite():
    flat = (jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    settings = {"guidance_rescale": 0.7, "guidance_parallel": 0.0, "guidance_norm": 1.0}
    np.testing.assert_array_equal(guided(flat, guidance_weight=3.0, **settings), flat[0])


def test_classifier_guidance_at_scale_one_is_bayes_rule():
    """Two classes N(+-M, C^2): the guided unconditional denoiser is that of the class."""
    mean, deviation = 0.6, 0.4

    def log_density(z, logsnr, sign):
        """log p(z | class) of each picture, up to a constant that both classes share."""
        alpha, sigma = (process.expand(s, z) for s in process.alpha_sigma(logsnr))
        variance = alpha**2 * deviation**2 + sigma**2
        return -0.5 * jnp.sum((z - sign * alpha * mean) ** 2 / variance, axis=(1, 2, 3))

    def log_prob(z, logsnr):
        both = jnp.stack([log_density(z, logsnr, +1), log_density(z, logsnr, -1)])
        return jax.nn.log_softmax(both, axis=0)[0]

    z = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    logsnr = jnp.array([-3.0, 0.0, 1.5])
    levels = np.asarray(logsnr)[:, None, None, None]
    plus, minus = (
        jnp.asarray(reference.gaussian_mean(z, levels, sign * mean, deviation), jnp.float32)
        for sign in (+1, -1)
    )
    z = jnp.asarray(z)
    share = process.expand(jnp.exp(log_prob(z, logsnr)), z)
    mixture = share * plus + (1.0 - share) * minus
    assert float(jnp.abs(mixture - plus).max()) > 0.05
    guided = jax.jit(guidance.classifier(lambda z, logsnr: mixture, log_prob, 1.0))
    np.testing.assert_allclose(guided(z, logsnr), plus, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("gamma", 1.5),
        ("guidance_weight", -1.0),
        ("guidance_weight", float("nan")),
        ("guidance_schedule", ((0.0, 1.0), (-1.0, 0.0))),
        ("guidance_schedule", ((0.0, 1.0, 2.0),)),
        ("guidance_interval", (1.0,)),
        ("guidance_interval", (2.0, -2.0)),
        ("guidance_oscillate_after", -2),
        ("guidance_rescale", 1.2),
        ("guidance_parallel", float("inf")),
        ("guidance_norm", -0.1),
        ("threshold_percentile", 0.0),
        ("threshold_percentile", 101.0),
        ("threshold_cap", 0.5),
        ("aug_level", 2.0),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**{field: value})
    assert str(error.value).startswith(f"config.sampling.{field}={value} must be ")
    assert "\n" not in str(error.value)
