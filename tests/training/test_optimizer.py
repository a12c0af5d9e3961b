"""Learning-rate schedules, update rules and the moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import EmaConfig, OptimizerConfig
from imagen_jax.training import ema
from imagen_jax.training.metrics import check_rankable
from imagen_jax.training.optimizer import (
    RULES,
    learning_rate,
    make_optimizer,
    with_rule_defaults,
)


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


def update_of(config: OptimizerConfig, steps: int = 12) -> list[np.ndarray]:
    """Parameters after each of a few updates with gradients that change."""
    optimizer = make_optimizer(config, steps)
    params = {"kernel": jnp.linspace(0.5, 2.0, 6).reshape(3, 2), "bias": jnp.ones(4)}
    state, seen = optimizer.init(params), []
    for step in range(steps):
        gradient = jax.tree.map(
            lambda p, step=step: (0.05, 3.0)[step % 2] * jnp.sin(3.0 * p + step), params
        )
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    return seen


OTHER_VALUES = {
    "learning_rate": 0.03,
    "schedule": "cosine",
    "warmup_steps": 5,
    "decay_fraction": 0.8,
    "b1": 0.5,
    "b2": 0.7,
    "eps": 0.3,
    "weight_decay": 0.4,
    "clip_norm": 0.1,
    "multiply_by_parameter_scale": True,
    "multipliers": ("kernel=0.5",),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(OptimizerConfig)][1:])
@pytest.mark.parametrize("name", list(RULES))
def test_every_field_changes_the_update_or_is_refused(name, field):
    base = OptimizerConfig(name=name, learning_rate=0.05, warmup_steps=0, schedule="linear_tail")
    changed = dataclasses.replace(base, **{field: OTHER_VALUES[field]})
    try:
        updated = update_of(changed)
    except ConfigError as error:
        message = str(error)
        assert f"config.optimizer.{field}=" in message and "\n" not in message
        assert field not in RULES[name].fields
        # The remedy that the message names works.
        other = message.rpartition("choose ")[2].split(" or ")[0]
        update_of(dataclasses.replace(changed, name=other))
        return
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(updated, update_of(base), strict=True))


def test_the_tail_is_a_field_of_its_schedule():
    config = OptimizerConfig(schedule="cosine", decay_fraction=0.8)
    with pytest.raises(ConfigError, match="decay_fraction=0.8 is not used.*choose linear_tail"):
        make_optimizer(config, 10)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_norms_and_biases_do_not_decay(name):
    """With zero gradients kernels shrink by learning_rate * weight_decay, vectors stay."""
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(4)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_defaults_belong_to_the_rule():
    assert with_rule_defaults(OptimizerConfig(name="adam")).b2 == 0.999
    assert with_rule_defaults(OptimizerConfig(name="lion")).b2 == 0.99
    assert with_rule_defaults(OptimizerConfig(name="lion", b2=0.999)).b2 == 0.999


def test_configurations_saved_with_all_defaults_still_load():
    """Before defaults were None, every field had a number, also where it was not used."""
    old = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "decay_fraction": 0.3}
    for name in ("adam", "adamw", "adafactor"):
        saved = OptimizerConfig(name=name, **old)
        assert with_rule_defaults(saved) == with_rule_defaults(OptimizerConfig(name=name))


@pytest.mark.parametrize("name", list(RULES))
def test_the_state_has_the_structure_of_optax_s_own(name):
    """So that checkpoints of earlier versions are restored."""
    theirs = {
        "adam": optax.adam(lambda step: 0.1),
        "adamw": optax.adamw(lambda step: 0.1, weight_decay=0.1),
        "adafactor": optax.adafactor(lambda step: 0.1, multiply_by_parameter_scale=False),
        "lion": optax.lion(lambda step: 0.1, weight_decay=0.1),
    }[name]
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(4)}
    ours = make_optimizer(OptimizerConfig(name=name, clip_norm=0.0), 10)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(theirs.init(params))


def test_the_metric_of_the_best_checkpoints_is_checked_at_the_start():
    check_rankable("x0_mse")
    with pytest.raises(ConfigError, match="config.checkpoint.best_metric='fid'.*loss, x0_mse"):
        check_rankable("fid")


def test_an_unknown_rule_or_schedule_is_refused():
    with pytest.raises(ConfigError, match="optimizer.name='sgd' is not one of adam, adamw"):
        make_optimizer(OptimizerConfig(name="sgd"), 10)
    with pytest.raises(ConfigError, match="optimizer.schedule='cosin'.*did you mean 'cosine'"):
        make_optimizer(OptimizerConfig(schedule="cosin"), 10)
