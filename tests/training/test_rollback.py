"""A roll-back skips the data that failed and changes the noise; a killed run decides the same."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from imagen_jax.config.schema import Config, TrainConfig
from imagen_jax.parallel.preemption import Preempted
from imagen_jax.training import faults
from imagen_jax.training.faults import DivergedError, Faults, Rollback
from imagen_jax.training.replay import replay
from imagen_jax.training.step import step_key, step_timesteps
from imagen_jax.training.train import train


def with_train(config: Config, **changes) -> Config:
    return dataclasses.replace(config, train=TrainConfig(**{"log_every": 1, **changes}))


def nan_in(*positions):
    def change(position, batch):
        factor = np.float32(np.nan if position in positions else 1)
        return {**batch, "image": batch["image"] * factor}

    return change


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.slow
def test_a_nan_in_one_batch_is_rescued_once(base_config, stream, tmp_path):
    config, seen, lines = with_train(base_config, steps=7, nan_patience=1), [], []
    batches = stream(config, nan_in(5), seen.append)
    state = train(config, str(tmp_path), batches, lines.append)
    assert (int(state.step), int(state.skipped)) == (7, 0)
    assert faults.read_rollbacks(str(tmp_path)) == [Rollback(restored=4, failed=5)]
    assert sum("roll-back 1 of 1, from step 5 to 4" in line for line in lines) == 1
    # Steps 4 to 6 have the data after the failed step.
    assert seen[-3:] == [6, 7, 8]
    # The step that failed replays on the noise and the data that it had.
    report = []
    assert replay(config, str(tmp_path), 5, stream(config, nan_in(5)), report.append)
    assert report[0] == "training from step 4 to step 5"


def test_nan_in_all_data_stops_with_one_line(base_config, stream, tmp_path):
    config = with_train(base_config, steps=30, nan_patience=3)
    with pytest.raises(DivergedError, match="3 steps in a row.*after 1 roll-backs") as error:
        train(config, str(tmp_path), stream(config, nan_in(*range(5, 90))), lambda line: None)
    assert "\n" not in str(error.value)
    assert len(faults.read_rollbacks(str(tmp_path))) == 1


@pytest.mark.parametrize(
    "target", [pytest.param(7, marks=pytest.mark.slow), 9, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_run_that_stops_around_a_roll_back_goes_on_exactly(target, base_config, stream, tmp_path):
    """Stops in the failed window, at the step of the roll-back, and after it."""
    config, quiet = with_train(base_config, steps=14, nan_patience=3), lambda line: None
    bad = nan_in(6, 7, 8)
    whole = train(config, str(tmp_path / "whole"), stream(config, bad), quiet)
    assert len(faults.read_rollbacks(str(tmp_path / "whole"))) == 1

    def stop_at(position):
        if position == target:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(config, str(tmp_path / "cut"), stream(config, bad, stop_at), quiet)
    again = train(config, str(tmp_path / "cut"), stream(config, bad), quiet)
    assert_same(again, whole)
    backs = [faults.read_rollbacks(str(tmp_path / name)) for name in ("cut", "whole")]
    assert backs[0] == backs[1]
    rows = [
        [(row["step"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("cut", "whole"))
    ]
    # json.loads gives a NaN per row that is not finite; repr compares them.
    assert repr(rows[0]) == repr(rows[1]) and len(rows[0]) == 14


def test_a_loss_spike_rolls_back(base_config, stream, tmp_path):
    config = with_train(base_config, steps=20, nan_patience=2, spike_factor=5.0)
    lines = []

    def blow_up(position, batch):
        factor = np.float32(100 if position in (14, 15) else 1)
        return {**batch, "image": batch["image"] * factor}

    state = train(config, str(tmp_path), stream(config, blow_up), lines.append)
    assert (int(state.step), int(state.skipped)) == (20, 0)
    ((back),) = faults.read_rollbacks(str(tmp_path))
    assert back.failed == 15 and back.restored <= 14
    assert any("exceeds 5 * " in line and "(2 in a row)" in line for line in lines)


def report_of(loss: float, finite: bool = True):
    return {"loss": loss, "finite": finite, "block_norms": {}}


def test_the_rule_of_a_spike(base_config, tmp_path):
    config = with_train(base_config, steps=99, nan_patience=1, rollbacks=5, spike_factor=3.0)
    watch, batch = Faults(str(tmp_path), config, log=lambda line: None), {"image": np.zeros((4, 1))}
    losses = [1.0, 9.0, 1.1, 0.9, 1.0, 1.0, 8.0, 1.2, 1.0]
    for loss in losses:
        watch.remember(loss)
    assert not watch.should_roll_back(1, report_of(100.0), batch)  # Nine rows are too few.
    watch.remember(float("nan"))
    assert not watch.should_roll_back(2, report_of(100.0), batch)  # Not finite: not counted.
    watch.remember(1.0)
    assert not watch.should_roll_back(3, report_of(2.9), batch)
    assert watch.should_roll_back(4, report_of(3.1), batch)


def test_what_decided_is_read_again(base_config, tmp_path):
    config = with_train(base_config, steps=99)
    rows = [{"step": step, "loss": step / 10} for step in range(1, 80)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 80, "l')
    backs = [{"restored": 20, "failed": 25}, {"restored": 70, "failed": 71}]
    (tmp_path / "rollbacks.json").write_text(json.dumps(backs))
    (tmp_path / "faults").mkdir()
    for step, rollbacks in ((46, 1), (47, 0), (48, 1), (49, 1), (51, 1)):
        values = {"step": step, "rollbacks": rollbacks}
        (tmp_path / "faults" / f"{step:08d}.0.json").write_text(json.dumps(values))
    watch = Faults(str(tmp_path), config)
    watch.resume(50)
    assert watch.rollbacks == [Rollback(20, 25)] and watch.position(50) == 56
    assert watch.in_a_row == 2  # Step 47 failed before the roll-back.
    assert watch._losses == [step / 10 for step in range(1, 51)]
    watch.resume(10)
    assert watch.rollbacks == [] and watch.position(10) == 10 and watch.in_a_row == 0


@pytest.mark.parametrize(
    ("steps", "failed", "expected"),
    [
        ([10, 20, 23], 25, 20),  # SIGTERM saved at 23.
        ([10, 20, 30], 31, 20),  # 30 is after 29, the first bad step.
        ([7], 9, 0),  # Without SIGTERM there would be no checkpoint.
        ([13], 25, 13),  # The regular ones are gone.
        ([30, 33], 25, 30),
        ([], 5, 0),
    ],
)
def test_the_checkpoint_of_a_roll_back(steps, failed, expected, base_config, tmp_path):
    checkpoint = dataclasses.replace(base_config.checkpoint, every=10)
    config = dataclasses.replace(with_train(base_config, nan_patience=3), checkpoint=checkpoint)
    assert Faults(str(tmp_path), config).last_good(steps, failed) == expected


def test_a_roll_back_changes_the_noise(base_config):
    times = [step_timesteps(base_config, 5, rollbacks) for rollbacks in (0, 1, 2)]
    assert len({tuple(t) for t in times}) == 3
    np.testing.assert_array_equal(
        jax.random.key_data(step_key(base_config, 5)),
        jax.random.key_data(step_key(base_config, 5, 0)),
    )
