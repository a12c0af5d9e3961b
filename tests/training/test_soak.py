"""A run killed twenty times at random moments, also during saves, equals an uninterrupted run."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imagen_jax.config.schema import CheckpointConfig
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.preemption import RESTART
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.state import TrainState
from tests.reference.workdirs import newest, rows

SOURCE = pathlib.Path(__file__).parents[2]
STEPS, SAVED_EVERY, KILLS = 400, 10, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[str]:
    """The shapes world with embeddings of a briefly trained encoder; returns the run's flags."""
    folder = tmp_path_factory.mktemp("world")
    overrides = {
        "data.path": folder / "data",
        "data.embeddings": folder / "embeddings",
        "text.path": folder / "text",
        "pretrain_text.corpus": folder / "data" / "paraphrases.jsonl",
        "pretrain_text.steps": 20,
        "train.steps": STEPS,
        "train.log_every": 1,
        "checkpoint.every": SAVED_EVERY,
        "mesh.cpu_devices": 1,
    }
    flags = ["--config=configs/shapes.py:base"]
    flags += [f"--config.{name}={value}" for name, value in overrides.items()]
    for verb in (["prepare"], ["pretrain_text", f"--out={folder / 'text'}"], ["embed"]):
        subprocess.run([sys.executable, "-m", "imagen_jax", *verb, *flags], cwd=SOURCE, check=True)
    return flags


def start(flags: list[str], workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "imagen_jax", "train", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(
        command,
        cwd=SOURCE,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")},
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_twenty_kills(world, tmp_path):
    assert start(world, tmp_path / "whole").wait() == 0
    rng, killed = random.Random(0), tmp_path / "killed"
    for kill in range(KILLS):
        # Rows after the newest checkpoint exist and will be replaced.
        begun = max((row["step"] for row in rows(killed)), default=0)
        process = start(world, killed)
        if kill % 5 == 4:
            # Kills it while it imports, restores or compiles.
            time.sleep(rng.uniform(0.5, 8.0))
        else:
            target = begun + rng.randint(1, STEPS // KILLS - 2)
            while process.poll() is None and not any(r["step"] >= target for r in rows(killed)):
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.2))
        number = signal.SIGTERM if kill % 2 else signal.SIGKILL
        process.send_signal(number)
        code = process.wait(timeout=120)
        done = max((row["step"] for row in rows(killed)), default=0)
        print(f"kill {kill}: signal {number}, exit {code}, at step {done}, saved {newest(killed)}")
        if number == signal.SIGTERM:
            # Before the verb has installed its handler, the signal ends the process.
            assert code == RESTART or (code == -signal.SIGTERM and kill % 5 == 4)
            assert code != RESTART or newest(killed) == done, "SIGTERM lost a step"
        else:
            assert code == -signal.SIGKILL
            # One save may be in progress and the next about to start.
            assert done - newest(killed) <= 2 * SAVED_EVERY
    assert start(world, killed).wait() == 0
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    for row, expected in zip(rows(killed), rows(tmp_path / "whole"), strict=True):
        assert row["loss"] == expected["loss"]
    whole, again = (state(tmp_path / name) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def state(workdir: pathlib.Path) -> TrainState:
    """The state of the last checkpoint of a run."""
    checkpoints = Checkpoints(str(workdir), CheckpointConfig())
    config = checkpoints.newest_config()
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, optimizer, mesh)
        restored = checkpoints.restore(STEPS, abstract)
    checkpoints.close()
    return restored
