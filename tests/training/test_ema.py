"""Power-function averages: their weights over training, and post-hoc reconstruction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import EmaConfig
from imagen_jax.training import ema
from imagen_jax.training.ema import Profile, Snapshot

WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.27)


def density(tau: np.ndarray, sigma_rel: float, step: int) -> np.ndarray:
    """p ~ tau^gamma on [0, step], normalised by a sum."""
    fine = (np.arange(100_000) + 0.5) / 100_000 * step
    exponent = ema.power_exponent(sigma_rel)
    mass = np.mean((fine / step) ** exponent) * step
    return np.where(tau <= step, (tau / step) ** exponent, 0.0) / mass


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_weights_of_the_recursion(sigma_rel):
    steps, config = 2000, EmaConfig(profiles=(sigma_rel,))
    decays = jax.vmap(lambda step: ema.decays(step, config))(jnp.arange(steps))
    beta = np.asarray(decays[ema.power_name(sigma_rel)], np.float64)
    assert beta[0] == 0.0
    later = np.append(np.cumprod(beta[::-1])[::-1][1:], 1.0)
    weights = (1.0 - beta) * later
    assert weights.sum() == pytest.approx(1.0)
    inside = (np.arange(20 * steps) + 0.5) / 20
    expected = density(inside, sigma_rel, steps).reshape(steps, 20).mean(axis=1)
    # A float32 beta has an error of 3e-8; 2000 of them are multiplied.
    np.testing.assert_allclose(weights, expected, atol=2e-4 * expected.max())
    tau = np.arange(steps) + 0.5
    mean = weights @ tau
    width = np.sqrt(weights @ (tau - mean) ** 2) / steps
    assert width == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Profile(0.05, 1000), Profile(0.05, 1000)),
        (Profile(0.05, 1000), Profile(0.1, 1000)),
        (Profile(0.2, 300), Profile(0.05, 1000)),
        (Profile(0.02, 900), Profile(0.27, 1000)),
        (Profile(0.1, 1), Profile(0.2, 1000)),
    ],
)
def test_inner_product_is_the_integral(a, b):
    end = min(a.step, b.step)
    tau = (np.arange(100_000) + 0.5) / 100_000 * end
    integral = np.mean(density(tau, *a) * density(tau, *b)) * end
    assert ema.inner_product(a, b) == pytest.approx(integral, rel=1e-5)
    assert ema.inner_product(b, a) == ema.inner_product(a, b)


def test_inner_products_of_long_runs_stay_finite():
    early, late = Profile(0.002, 10), Profile(0.002, 2_500_000)
    assert ema.inner_product(early, late) == 0.0
    assert 0.0 < ema.inner_product(late, late) < 1.0


STEPS, EVERY, TRACKED = 4096, 128, (0.05, 0.10)
TARGETS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)


@pytest.fixture(scope="module")
def tracked():
    """(parameters, {name: average}) after every step of a random walk with drift.

    Each parameter starts at about 1, drifts by about 1 and walks by about 1.
    """
    rng = np.random.default_rng(0)
    start, drift = rng.normal(size=(2, 200))
    walk = rng.normal(size=(STEPS, 200)).cumsum(axis=0) / STEPS**0.5
    path = start + drift * np.arange(1, STEPS + 1)[:, None] / STEPS + walk
    path = jnp.asarray(path, jnp.float32)
    config = EmaConfig(profiles=tuple(sorted({*TRACKED, *TARGETS})))

    def advance(averages, now):
        step, params = now
        decays = ema.decays(step, config)
        averages = {n: ema.update(a, params, decays[n]) for n, a in averages.items()}
        return averages, averages

    first = dict.fromkeys(ema.names(config), path[0])
    _, averages = jax.lax.scan(advance, first, (jnp.arange(STEPS), path))
    return jax.device_get((path, averages))


def snapshots(averages) -> list[Snapshot]:
    return [
        Snapshot(Profile(s, t), lambda s=s, t=t: {"w": averages[ema.power_name(s)][t - 1]})
        for t in range(EVERY, STEPS + 1, EVERY)
        for s in TRACKED
    ]


@pytest.mark.parametrize("step", [3000, 3072, STEPS])
@pytest.mark.parametrize("sigma_rel", TARGETS)
def test_a_reconstruction_equals_the_average_tracked_directly(tracked, sigma_rel, step):
    path, averages = tracked
    direct = averages[ema.power_name(sigma_rel)][step - 1]
    params, error = ema.reconstruct(snapshots(averages), sigma_rel, step)
    assert params["w"].dtype == np.float32
    difference = np.linalg.norm(params["w"] - direct)
    assert difference < 0.01 * np.linalg.norm(direct)
    if step % EVERY == 0:  # also against how far the averaging moved the parameters
        assert error < 0.05
        assert difference < 0.02 * np.linalg.norm(direct - path[step - 1])


def test_a_constant_parameter_is_reconstructed_exactly(tracked):
    _, averages = tracked
    constant = {"w": np.float32([1.0, -3.0])}
    frozen = [Snapshot(s.profile, lambda: constant) for s in snapshots(averages)]
    for sigma_rel in (0.01, 0.07, 0.25):
        params, _ = ema.reconstruct(frozen, sigma_rel, STEPS)
        np.testing.assert_allclose(params["w"], [1.0, -3.0], rtol=1e-6)


def test_snapshots_are_read_one_at_a_time(tracked):
    reads = []

    def recording(snapshot: Snapshot) -> Snapshot:
        return snapshot._replace(load=lambda: reads.append(snapshot.profile) or snapshot.load())

    saved = snapshots(tracked[1])
    ema.reconstruct([recording(s) for s in saved], 0.07, STEPS)
    assert reads == [s.profile for s in saved]


@pytest.mark.parametrize("sigma_rel", [-0.1, 0.0, 0.28, 1.0, float("nan")])
def test_a_width_out_of_range_is_rejected(sigma_rel):
    with pytest.raises(ConfigError, match=r"sigma_rel=.* above 0 and below 0.28; try 0.1"):
        ema.power_exponent(sigma_rel)
    with pytest.raises(ConfigError, match=r"config.ema.profiles\[1\]=.*; try 0.1"):
        EmaConfig(profiles=(0.05, sigma_rel))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profiles": (0.05, 0.0502)}, "must differ in their first three decimals"),
        ({"snapshot_every": 10}, r"config.ema.snapshot_every=10 .*try \(0.05, 0.1\)"),
        ({"profiles": (0.05,), "snapshot_every": -1}, "config.ema.snapshot_every=-1 must be"),
    ],
)
def test_invalid_settings_are_rejected(fields, message):
    with pytest.raises(ConfigError, match=message):
        EmaConfig(**fields)


def test_names_of_the_averages():
    config = EmaConfig(profiles=(0.05, 0.1))
    assert ema.names(config) == ("ema", "power_0.050", "power_0.100")
    assert set(ema.decays(jnp.asarray(3), config)) == set(ema.names(config))
    assert ema.names(EmaConfig()) == ("ema",)
