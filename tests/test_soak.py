"""Twenty kills at random moments, also in the middle of a save: the run ends as if nothing was."""

import json
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

from imagen_jax.config_io import load
from imagen_jax.preemption import RESTART
from imagen_jax.train import train

SOURCE = pathlib.Path(__file__).parents[1]
STEPS, SAVED_EVERY, KILLS = 600, 4, 20


def start(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=SOURCE,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
    )


def rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def newest(workdir: pathlib.Path) -> int:
    folders = (workdir / "checkpoints").glob("*")
    return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=0)


@pytest.mark.slow
def test_twenty_kills(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=STEPS, every=SAVED_EVERY)
    assert start(config, tmp_path / "whole").wait() == 0
    draw, killed = random.Random(0), tmp_path / "killed"
    for kill in range(KILLS):
        process, begun = start(config, killed), newest(killed)
        target = begun + draw.randint(1, STEPS // KILLS - 6)
        while process.poll() is None and not any(r["step"] >= target for r in rows(killed)):
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.05))
        number = signal.SIGTERM if kill % 2 else signal.SIGKILL
        process.send_signal(number)
        code = process.wait(timeout=120)
        done = max(row["step"] for row in rows(killed))
        if number == signal.SIGTERM:
            assert code == RESTART and newest(killed) == done, "SIGTERM lost a step"
        else:
            assert code == -signal.SIGKILL
            # One save may have been under way, the next about to begin.
            assert done - newest(killed) <= 2 * SAVED_EVERY
    assert start(config, killed).wait() == 0
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    for row, expected in zip(rows(killed), rows(tmp_path / "whole"), strict=True):
        assert row["loss"] == expected["loss"]
    whole, again = (
        jax.device_get(
            train(load(str(config), ["model.text_dim=8"]), str(tmp_path / name), lambda step: ())
        )
        for name in ("whole", "killed")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, again)
