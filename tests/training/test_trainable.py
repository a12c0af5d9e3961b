"""Trained and frozen parts, their learning rates, and starting from other networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config, EmaConfig, OptimizerConfig, TrainConfig
from imagen_jax.export.export import read_average
from imagen_jax.interop.weights import WeightsError, flatten
from imagen_jax.parallel import partitioning
from imagen_jax.stages.folder import write_stage_files
from imagen_jax.stages.loss import check_trainable, loss_given_randomness, sample_randomness
from imagen_jax.training.initial_state import abstract_state, start_from
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.replay import replay
from imagen_jax.training.step import step_key
from imagen_jax.training.train import train

PATTERNS = ("*attention*", "cond")


def with_train(config: Config, **fields) -> Config:
    return dataclasses.replace(
        config, train=TrainConfig(**{"steps": 4, "log_every": 1, **fields}), ema=EmaConfig()
    )


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def partly(base_config, random_params, stream, tmp_path_factory):
    """Configuration, first and last state, folder and log of a run that trains two parts.

    It starts from a stage: at random, the frozen last layer would be zero, and all gradients.
    """
    workdir, lines = tmp_path_factory.mktemp("partly"), []
    stage = tmp_path_factory.mktemp("stage")
    write_stage_files(stage, random_params(base_config), base_config, {})
    config = with_train(base_config, trainable=PATTERNS, init_from=str(stage))
    first = jax.device_get(started(config, stage))
    state = train(config, str(workdir), stream(config), lines.append)
    return config, first, jax.device_get(state), workdir, lines


@pytest.mark.slow
def test_frozen_parts_are_bit_equal_and_have_no_slots(partly):
    _, first, last, _, lines = partly
    before, after = flatten(first.params), flatten(last.params)
    trained = {name for name in before if "attention" in name or name.startswith("cond/")}
    assert trained and trained < set(before)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name not in trained), name
    assert set(flatten(last.ema["ema"])) == trained
    moments = [s for s in jax.tree.leaves(last.opt_state, is_leaf=is_adam) if is_adam(s)]
    assert moments and all(set(flatten(m.mu)) == set(flatten(m.nu)) == trained for m in moments)
    counts = sum(before[name].size for name in trained), sum(v.size for v in before.values())
    assert f"{counts[0]:,} of {counts[1]:,} parameters are trained" in lines


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.slow
def test_the_average_of_a_run_has_the_frozen_parts(partly):
    _, first, last, workdir, _ = partly
    params, _, _ = read_average(str(workdir))
    average, frozen = flatten(last.ema["ema"]), flatten(first.params)
    for name, value in flatten(jax.device_get(params)).items():
        np.testing.assert_array_equal(value, average.get(name, frozen[name]), err_msg=name)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(partly, base_config, stream, tmp_path):
    config, last = partly[0], partly[2]
    stop = lambda position: position < 3 or pytest.fail("killed")  # noqa: E731
    with pytest.raises(pytest.fail.Exception):
        train(config, str(tmp_path), stream(config, event=stop), len)
    assert_same(train(config, str(tmp_path), stream(config), len), last)


@pytest.mark.slow
def test_accumulation_and_all_patterns_train_as_without(base_config, stream, tmp_path):
    states = [
        train(with_train(base_config, **fields), str(tmp_path / name), stream(base_config), len)
        for name, fields in (("all", {}), ("patterns", {"trainable": ("*",)}))
    ]
    assert_same(*states)


def test_memory_falls_by_gradient_slots_and_average(base_config):
    """Arguments of the compiled step: 3 float32 copies less of every frozen parameter."""
    sizes = {}
    for name, patterns in (("all", ()), ("part", PATTERNS)):
        config = with_train(base_config, trainable=patterns)
        optimizer, mesh = make_optimizer(config.optimizer, 4), partitioning.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            _, abstract = abstract_state(config, optimizer, mesh)
        sizes[name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        flat = flatten(abstract.params)
    frozen = sum(
        x.size for name, x in flat.items() if not ("attention" in name or name.startswith("cond/"))
    )
    assert sizes["all"] - sizes["part"] == 3 * 4 * frozen


def test_multipliers_scale_the_updates(base_config, random_params):
    params = random_params(base_config)
    gradient = jax.tree.map(np.ones_like, params)

    def updates(*multipliers):
        config = OptimizerConfig(warmup_steps=0, multipliers=multipliers)
        optimizer = make_optimizer(config, 10)
        return flatten(optimizer.update(gradient, optimizer.init(params), params)[0])

    plain, scaled = updates(), updates("*=0.5", "cond=0", "conv_in/kernel=3")
    for name, value in plain.items():
        factor = {"conv_in/kernel": 3.0}.get(name, 0.0 if name.startswith("cond/") else 0.5)
        np.testing.assert_allclose(scaled[name], factor * value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ("atention",)}, "train.trainable: 'atention' matches no trained parameter"),
        ({"multipliers": ("cond",)}, "optimizer.multipliers has 'cond', must be PATTERN=FACTOR"),
        ({"multipliers": ("cond=-1",)}, "must be PATTERN=FACTOR"),
        ({"trainable": ("cond",), "multipliers": ("conv_in=2",)}, "'conv_in' matches no trained"),
    ],
)
def test_patterns_are_checked(base_config, stream, tmp_path, fields, message):
    config = with_train(base_config, trainable=fields.get("trainable", ()))
    optimizer = dataclasses.replace(config.optimizer, multipliers=fields.get("multipliers", ()))
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, optimizer=optimizer), str(tmp_path), stream(config))


def started(config: Config, path, log=lambda line: None):
    optimizer, mesh = make_optimizer(config.optimizer, 4), partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, optimizer, mesh)
        return start_from(str(path), abstract, optimizer, config, log)


@pytest.mark.slow
def test_another_text_encoder_starts_from_what_fits(partly, base_config):
    """A wider text: its projections are random, everything else is read, each is listed."""
    workdir, lines = partly[3], []
    model = dataclasses.replace(base_config.model, text_dim=12)
    config = with_train(dataclasses.replace(base_config, model=model))
    with pytest.raises(WeightsError, match="init_partial=false.*wrong shape: .*is .*, expected"):
        started(config, workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_partial=True))
    state = started(config, workdir, lines.append)
    source = flatten(jax.device_get(read_average(str(workdir))[0]))
    changed = []
    for name, value in flatten(jax.device_get(state.params)).items():
        if source[name].shape == value.shape:
            np.testing.assert_array_equal(value, source[name], err_msg=name)
        else:
            changed.append(name)
            assert any(f"{name} {value.shape} starts at random: it is" in line for line in lines)
    assert changed and len(lines) == len(changed)
    assert any(np.abs(flatten(jax.device_get(state.params))[name]).max() > 0 for name in changed)


@pytest.mark.slow
def test_parameters_on_one_side_alone_are_listed(partly, base_config):
    workdir, lines = partly[3], []
    model = dataclasses.replace(base_config.model, cross_attention=(False,), num_res_blocks=(2,))
    config = with_train(dataclasses.replace(base_config, model=model), init_partial=True)
    started(config, workdir, lines.append)
    assert any("starts at random: it is not in" in line for line in lines)
    assert any("is not used: the network has none" in line for line in lines)


@pytest.mark.slow
def test_the_optimizer_state_is_reset_or_kept(partly, base_config):
    config, _, last, workdir, _ = partly
    reset = started(config, workdir)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(reset.opt_state))
    kept_config = with_train(config, trainable=PATTERNS, init_optimizer="kept")
    kept = started(kept_config, workdir)
    ours, theirs = (
        [s for s in jax.tree.leaves(tree, is_leaf=is_adam) if is_adam(s)][0]
        for tree in (kept.opt_state, last.opt_state)
    )
    assert_same(ours, theirs)
    schedules = [
        part for part in jax.tree.leaves(kept.opt_state, is_leaf=is_schedule) if is_schedule(part)
    ]
    assert schedules and all(int(part.count) == 0 for part in schedules)
    other = with_train(base_config, init_optimizer="kept")
    with pytest.raises(ConfigError, match="init_optimizer='kept'.*the same optimizer"):
        started(other, workdir)


def test_a_stage_with_another_null_text_is_tuned_without_dropping_captions(base_config):
    text = dataclasses.replace(base_config.text, null="empty")
    config = dataclasses.replace(base_config, text=text)
    with pytest.raises(ConfigError, match="config.text.null='empty'.*cond_drop_prob=0"):
        check_trainable(config)
    diffusion = dataclasses.replace(config.diffusion, cond_drop_prob=0.0)
    check_trainable(dataclasses.replace(config, diffusion=diffusion))


def is_schedule(node) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


@pytest.mark.slow
def test_a_fault_before_the_first_checkpoint_is_replayed_from_the_stage(
    base_config, random_params, stream, tmp_path
):
    def change(step, batch):
        images = batch["image"].copy()
        images[0] *= np.nan
        return {**batch, "image": images}

    params, workdir = random_params(base_config, 1), str(tmp_path / "run")
    write_stage_files(tmp_path, params, base_config, {})
    config = with_train(base_config, steps=1, init_from=str(tmp_path))
    train(config, workdir, stream(config, change), lambda line: None)
    report: list[str] = []
    assert replay(config, workdir, 0, stream(config, change), report.append)
    shown = [float(line.split()[5]) for line in report if line.startswith("record ")]
    batch = next(iter(stream(config)(0)))
    examples = {name: jnp.asarray(value) for name, value in batch.items()}
    examples |= sample_randomness(step_key(config, 0), 4, config)
    for row in range(1, 4):
        example = {name: value[row : row + 1] for name, value in examples.items()}
        expected, _ = loss_given_randomness(
            jax.tree.map(jnp.asarray, params), example, None, config
        )
        assert shown[row] == pytest.approx(float(expected), rel=2e-3)
    assert np.isnan(shown[0])
