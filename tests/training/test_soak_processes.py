"""Four processes that are killed, preempted and stopped end as if nothing had happened.

`launch/keep_running.sh` and `launch/local_processes.sh` bring the run back each time.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.config.overrides import load
from imagen_jax.config.schema import CheckpointConfig
from imagen_jax.parallel import partitioning
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from tests.reference.launch import until
from tests.reference.workdirs import newest, rows

SOURCE = pathlib.Path(__file__).parents[2]
PROCESSES, STEPS_PER_EVENT, SAVED_EVERY = 4, 120, 25
# A start takes up to half of this on one core: the four processes import and compile.
HANG_TIMEOUT = 90


def launch(config: pathlib.Path, workdir: pathlib.Path, steps: int) -> subprocess.Popen:
    keep = ["bash", "launch/keep_running.sh", "--delay=0", "--max_restarts=100"]
    local = ["bash", "launch/local_processes.sh", "--grace=5", str(PROCESSES)]
    train = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    train += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
    train += [f"--config.train.hang_timeout={HANG_TIMEOUT}", "--config.train.checksum_every=20"]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
    }
    with (workdir.parent / f"{workdir.name}.log").open("w") as log:
        return subprocess.Popen(
            [*keep, *local, *train], cwd=SOURCE, env=environment, stdout=log, stderr=log
        )


def processes_of(workdir: pathlib.Path) -> list[int]:
    """Ids of the training processes, without the scripts that start them."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"--workdir={workdir}" in words and words[1:3] == ["-m", "imagen_jax"] and state != "Z":
            found.append(int(folder.name))
    return found


def last_step(workdir: pathlib.Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def state_of(workdir: pathlib.Path, config_file: pathlib.Path, steps: int):
    config = load(str(config_file), ["model.text_dim=8"])
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, optimizer, mesh)
        return Checkpoints(str(workdir), CheckpointConfig()).restore(steps, abstract)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "preemptions", "stops"), [(1, 1, 1), (10, 5, 2)], ids=["short", "long"]
)
def test_four_processes_survive(kills, preemptions, stops, base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=1, every=SAVED_EVERY)
    events = ["kill"] * kills + ["preempt"] * preemptions + ["stop"] * stops
    steps, rng = STEPS_PER_EVENT * len(events), random.Random(0)
    rng.shuffle(events)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(config, whole, steps).wait() == 0

    launcher = launch(config, run, steps)
    try:
        for event in events:
            target = last_step(run) + rng.randint(1, 20)
            assert until(lambda target=target: last_step(run) >= target, seconds=400), event
            started = processes_of(run)
            assert len(started) == PROCESSES and launcher.poll() is None, event
            number = {"kill": signal.SIGKILL, "preempt": signal.SIGTERM, "stop": signal.SIGSTOP}
            for process in started if event == "preempt" else [rng.choice(started)]:
                os.kill(process, number[event])
            gone = lambda started=started: not set(started) & set(processes_of(run))  # noqa: E731
            assert until(gone, seconds=HANG_TIMEOUT + 120), event
            print(f"{event}: at step {last_step(run)}, saved {newest(run)}")
            if event == "preempt":
                assert newest(run) == last_step(run), "a preemption lost a step"
        assert launcher.wait(timeout=900) == 0
    finally:
        launcher.terminate()
        launcher.wait(timeout=60)
    log = (tmp_path / "run.log").read_text()
    assert log.count("; starting again in 0 s") == len(events)
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(state_of(workdir, config, steps)) for workdir in (run, whole)),
    )
