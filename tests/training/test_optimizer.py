"""Learning-rate schedules, update rules and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import EmaConfig, OptimizerConfig
from imagen_jax.training import ema
from imagen_jax.training.optimizer import learning_rate, make_optimizer


def rates(schedule: str, warmup: int = 10, total: int = 100) -> np.ndarray:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    return np.asarray(jax.vmap(learning_rate(config, total))(jnp.arange(total + 1)))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear_tail", "rsqrt"])
def test_warmup_is_linear_to_the_peak(schedule):
    got = rates(schedule)
    np.testing.assert_allclose(got[:11], np.arange(11) * 0.2, rtol=1e-6)
    assert got.max() == pytest.approx(2.0) and (np.diff(got[10:]) <= 1e-6).all()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear_tail", "rsqrt"])
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert rates(schedule, warmup=0)[0] == pytest.approx(2.0)


def test_final_values_of_the_schedules():
    assert rates("constant")[-1] == pytest.approx(2.0)
    assert rates("cosine")[-1] == pytest.approx(0.0, abs=1e-6)
    assert rates("cosine")[55] == pytest.approx(1.0)
    linear = rates("linear_tail")
    assert linear[70] == pytest.approx(2.0) and linear[85] == pytest.approx(1.0)
    assert linear[-1] == pytest.approx(0.0, abs=1e-6)
    assert rates("rsqrt")[40] == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [85, 99, 100, 10_000])
def test_a_run_with_almost_only_warmup_has_finite_rates(warmup):
    assert np.isfinite(rates("linear_tail", warmup=warmup)).all()
    if warmup < 100:
        assert rates("linear_tail", warmup=warmup)[-1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "adafactor", "lion"])
def test_every_rule_reduces_the_loss(name):
    config = OptimizerConfig(name=name, learning_rate=0.05, warmup_steps=0)
    optimizer = make_optimizer(config, 50)
    params = {"a": jnp.ones((3, 2)), "b": jnp.full(4, -2.0)}
    state = optimizer.init(params)
    for _ in range(10):
        updates, state = optimizer.update(params, state, params)  # gradient of |params|^2 / 2
        params = jax.tree.map(jnp.add, params, updates)
    assert float(params["a"].max()) < 0.8 and float(params["b"].min()) > -1.8


def test_clipping_is_by_the_global_norm():
    # Adam's first update is lr * sign of the gradient, so only the moments show the clipping.
    gradient = {"a": jnp.full(3, 100.0), "b": jnp.full(1, 100.0)}
    for clip, expected in [(1.0, 0.5), (0.0, 100.0), (1e6, 100.0)]:
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, b1=0.9), 10)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
        np.testing.assert_allclose(moments[0], 0.1 * expected, rtol=1e-5)


def test_the_average_starts_at_the_parameters_and_its_decay_rises():
    config = EmaConfig(decay=0.9, warmup_power=0.75)
    decays = [float(ema.decay_at(jnp.asarray(step), config)) for step in range(100)]
    assert decays[0] == 0.0 and decays[-1] == pytest.approx(0.9)
    assert decays[1] == pytest.approx(1 - 2**-0.75) and (np.diff(decays) >= 0).all()


def test_the_average_is_a_weighted_sum_of_the_parameters():
    values = np.random.default_rng(0).normal(size=(5, 3))
    decay, average = 0.8, {"w": jnp.asarray(values[0], jnp.float32)}
    for value in values[1:]:
        average = ema.update(average, {"w": jnp.asarray(value, jnp.float32)}, jnp.float32(decay))
    weights = np.array([decay**4, *(0.2 * decay ** (4 - i) for i in range(1, 5))])
    np.testing.assert_allclose(average["w"], weights @ values, rtol=1e-5)
