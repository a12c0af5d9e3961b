"""The time of a save is logged, and a save that a preemption would cut is reported."""

import dataclasses
import itertools

import numpy as np
import pytest

from imagen_jax.config.schema import CheckpointConfig, TrainConfig
from imagen_jax.training import save_time
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.save_time import SaveTime
from imagen_jax.training.train import train


class Saving(Checkpoints):
    """Checkpoints whose save ends when the test says so."""

    ends = False

    def __init__(self):
        pass

    def is_saving(self):
        return not self.ends


@pytest.mark.parametrize(("seconds", "warned"), [(20.0, False), (40.0, True)])
def test_a_save_that_exceeds_the_grace_is_reported(seconds, warned, monkeypatch):
    now, lines, checkpoints = [100.0], [], Saving()
    monkeypatch.setattr(save_time.time, "monotonic", lambda: now[0])
    timed = SaveTime(checkpoints, 30.0, lines.append)
    timed.poll()
    timed.begin(7, {"a": np.zeros(10**6, np.float32), "b": np.zeros(10**6, np.float32)})
    now[0] += seconds
    timed.poll()
    assert lines == []
    checkpoints.ends = True
    timed.poll()
    timed.poll()
    rate = 0.008 / seconds
    assert lines[0] == f"checkpoint of step 7: 0.008 GB in {seconds:.1f} s, {rate:.3g} GB/s"
    assert len(lines) == 1 + warned
    assert all(
        "may lose steps" in line and "config.checkpoint.grace=30;" in line for line in lines[1:]
    )


def test_a_run_logs_its_saves(base_config, make_batch, tmp_path):
    config = dataclasses.replace(
        base_config,
        train=TrainConfig(steps=40, log_every=1),
        checkpoint=CheckpointConfig(every=10, grace=1e-6),
    )
    lines = []
    train(config, str(tmp_path), lambda step: itertools.repeat(make_batch(config)), lines.append)
    assert any(line.startswith("checkpoint of step 10: ") for line in lines)
    assert any("config.checkpoint.grace=1e-06" in line for line in lines)
