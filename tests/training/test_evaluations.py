"""Evaluations in training: fixed numbers, schedule, resumption, ranking of checkpoints."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import CheckpointConfig, Config, TrainConfig
from imagen_jax.config.train import EvaluateConfig
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.preemption import Preempted
from imagen_jax.stages.loss import loss_given_randomness, sample_randomness
from imagen_jax.training.evaluations import Evaluation, Evaluations
from imagen_jax.training.train import train
from imagen_jax.training.validation_loss import EVALUATE_STREAM, ValidationLoss


def with_evaluation(config: Config, *, steps=6, every=2, keep_best=0, best="loss", **fields):
    return dataclasses.replace(
        config,
        train=TrainConfig(steps=steps, log_every=1),
        checkpoint=CheckpointConfig(every=every, keep=1, keep_best=keep_best, best_metric=best),
        evaluate=EvaluateConfig(every=every, **{"examples": 8, **fields}),
    )


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def evaluated(workdir) -> list[dict]:
    found = [row for row in rows(workdir) if "loss" not in row]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


class Recorded:
    """Evaluates a number that is given for every step; other numbers for the raw parameters."""

    def __init__(self, values, better="lower", event=lambda step, proceed: None):
        self.values, self.event = values, event
        self.metrics = {"value": better}

    def __call__(self, params, step, name, proceed):
        self.event(step, proceed)
        proceed()
        return Evaluation({"value": self.values[step] + (name == "params")})


@pytest.fixture(scope="module")
def make_loss(stream):
    """config -> the evaluator on held-out batches that no step of training reads."""

    def make(config: Config, event=lambda position: None):
        held_out = stream(config, event=event)
        return ValidationLoss(
            config, held_out=lambda start: held_out(start + 10**6), training=stream(config)
        )

    return make


def test_the_loss_is_that_of_the_fixed_times_noise_and_data(
    base_config, make_loss, make_batch, random_params
):
    """Against the loss of single examples, one at a time."""
    config = with_evaluation(base_config, examples=7)  # Rounded up to two batches.
    params = jax.tree.map(jnp.asarray, random_params(config))
    with jax.set_mesh(partitioning.make_mesh(config.mesh)):
        found = make_loss(config)(params, 0, "ema", lambda: None).scalars
    single = jax.jit(lambda params, one: loss_given_randomness(params, one, None, config)[0])
    key = jax.random.fold_in(jax.random.key(config.seed), EVALUATE_STREAM)
    size, expected = config.data.batch_size, {}
    for part, start in (("validation", 10**6), ("training", 0)):
        losses = []
        for index in range(2):
            batch = make_batch(config, seed=start + index)
            batch |= sample_randomness(jax.random.fold_in(key, index), size, config)
            for row in range(size):
                one = {k: jnp.asarray(value[row : row + 1]) for k, value in batch.items()}
                losses.append(float(single(params, one)))
        expected[part] = np.mean(losses)
    assert found["validation_loss"] == pytest.approx(expected["validation"], rel=1e-4)
    assert found["training_loss"] == pytest.approx(expected["training"], rel=1e-4)
    gap = expected["validation"] - expected["training"]
    assert found["loss_gap"] == pytest.approx(gap, abs=2e-4 * expected["validation"])
    levels = [name for name in found if name.startswith("validation_loss/logsnr_")]
    assert levels and all(name.replace("validation_loss", "loss_gap") in found for name in levels)


@pytest.mark.slow
def test_a_run_writes_averages_and_raw_parameters_on_the_schedule(
    base_config, stream, make_loss, tmp_path
):
    config, lines = with_evaluation(base_config, steps=5), []
    train(
        config,
        str(tmp_path),
        stream(config),
        lines.append,
        evaluators={"loss": make_loss(config)},
    )
    found = evaluated(tmp_path)
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    assert {"ema/validation_loss", "params/validation_loss", "ema/loss_gap"} <= found[0].keys()
    assert found[-1]["ema/validation_loss"] != found[-1]["params/validation_loss"]
    assert found[-1]["params/validation_loss"] < found[0]["params/validation_loss"]
    assert any("evaluation at step 4  ema/validation_loss" in line for line in lines)
    # The steps themselves are those of a run without evaluations.
    other = tmp_path / "other"
    train(dataclasses.replace(config, evaluate=EvaluateConfig()), str(other), stream(config), len)
    of_steps = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["loss"] for row in of_steps] == [row["loss"] for row in rows(other)]


@pytest.mark.slow
def test_an_interrupted_evaluation_is_repeated_with_the_same_numbers(
    base_config, stream, make_loss, tmp_path
):
    config = with_evaluation(base_config, keep_best=1, best="ema/validation_loss")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, str(whole), stream(config), len, evaluators={"loss": make_loss(config)})
    reads = []

    def interrupt(position: int) -> None:
        reads.append(position)
        if len(reads) == 7:  # The first batch of the raw parameters at step 2.
            os.kill(os.getpid(), signal.SIGTERM)

    evaluators = {"loss": make_loss(config, event=interrupt)}
    with pytest.raises(Preempted, match="saved at step 2"):
        train(config, str(stopped), stream(config), len, evaluators=evaluators)
    assert [row["step"] for row in evaluated(stopped)] == [0]
    train(config, str(stopped), stream(config), len, evaluators=evaluators)
    assert evaluated(stopped) == evaluated(whole)
    assert [row["loss"] for row in rows(stopped) if "loss" in row] == [
        row["loss"] for row in rows(whole) if "loss" in row
    ]


def train_stopped_at_the_second_step(config, folder, stream, values) -> None:
    """Trains with an evaluation that is preempted at step 2, and again to the end."""

    def stop(step, proceed):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        evaluators = {"a": Recorded(values, event=stop)}
        train(config, str(folder), stream(config), len, evaluators=evaluators)
    train(config, str(folder), stream(config), len, evaluators={"a": Recorded(values)})


@pytest.mark.slow
def test_a_run_stopped_in_its_last_evaluation_completes_it(base_config, stream, tmp_path):
    config = with_evaluation(base_config, steps=2)
    values = dict.fromkeys(range(9), 1.0)
    train_stopped_at_the_second_step(config, tmp_path, stream, values)
    assert [row["step"] for row in evaluated(tmp_path)] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("better", "kept"), [("lower", 2), ("higher", 4)])
def test_the_best_checkpoint_is_that_of_the_evaluation(base_config, stream, tmp_path, better, kept):
    config = with_evaluation(base_config, keep_best=1, best="ema/value")
    values = {0: 0.0, 2: 1.0, 4: 3.0, 6: 2.0}
    evaluators = {"a": Recorded(values, better)}
    train(config, str(tmp_path), stream(config), len, evaluators=evaluators)
    found = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert found == {kept, 6}


@pytest.mark.slow
def test_a_checkpoint_saved_before_its_evaluation_is_ranked(base_config, stream, tmp_path):
    config = with_evaluation(base_config, keep_best=1, best="ema/value")
    values = {0: 0.0, 2: 1.0, 4: 3.0, 6: 2.0}
    train_stopped_at_the_second_step(config, tmp_path, stream, values)
    found = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert found == {2, 6}


def test_settings_are_checked_at_the_start(base_config, tmp_path):
    evaluators = {"a": Recorded({})}

    def check(config):
        Evaluations(config, str(tmp_path), evaluators)

    check(with_evaluation(base_config, keep_best=1, best="params/value"))
    with pytest.raises(ConfigError, match="best_metric='ema/valeu'.*did you mean 'ema/value'"):
        check(with_evaluation(base_config, keep_best=1, best="ema/valeu"))
    with pytest.raises(ConfigError, match="best_metric='ema/value' is not one of loss"):
        check(with_evaluation(base_config, best="ema/value", every=2, averages=("params",)))
    with pytest.raises(ConfigError, match="config.evaluate.averages='power_0.050' is not one of"):
        check(with_evaluation(base_config, averages=("power_0.050",)))
    config = with_evaluation(base_config, keep_best=1, best="ema/value")
    config = dataclasses.replace(config, evaluate=EvaluateConfig(every=4))
    with pytest.raises(ConfigError, match="checkpoint.every=2 must be a multiple of .*every=4"):
        check(config)
