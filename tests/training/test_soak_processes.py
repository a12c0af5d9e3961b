"""Four processes that are killed, preempted and stopped end as if nothing had happened.

`launch/keep_running.sh` and `launch/local_processes.sh` bring the run back each time. The numbers
of events of the long variant, and the order and moments of events of both:
  SOAK_KILLS=20 SOAK_PREEMPTIONS=2 SOAK_STOPS=0 SOAK_SEED=7 pytest -k long PATH
"""

import contextlib
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

from imagen_jax.config.overrides import load
from imagen_jax.config.schema import CheckpointConfig
from imagen_jax.parallel import partitioning
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from tests.reference.launch import until
from tests.reference.workdirs import newest, rows

SOURCE = pathlib.Path(__file__).parents[2]
PROCESSES, STEPS_PER_EVENT, SAVED_EVERY = 4, 16, 5
SEED = int(os.environ.get("SOAK_SEED", "0"))
SHORT = (1, 1, 1)
LONG = tuple(
    int(os.environ.get(f"SOAK_{name}", default))
    for name, default in {"KILLS": "10", "PREEMPTIONS": "5", "STOPS": "2"}.items()
)
# A start takes up to half of this on one core, with the compiled step in the cache.
HANG_TIMEOUT = 120


@contextlib.contextmanager
def launched(config: pathlib.Path, workdir: pathlib.Path, steps: int, *, hang_timeout: int):
    """A run of four processes; yields the launcher, and ends it."""
    keep = ["bash", "launch/keep_running.sh", "--delay=0", "--max_restarts=100"]
    local = ["bash", "launch/local_processes.sh", "--grace=5", str(PROCESSES)]
    train = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    train += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
    train += [f"--config.train.hang_timeout={hang_timeout}", "--config.train.checksum_every=10"]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (workdir.parent / f"{workdir.name}.log").open("w") as log:
        launcher = subprocess.Popen(
            [*keep, *local, *train], cwd=SOURCE, env=environment, stdout=log, stderr=log
        )
    try:
        yield launcher
    finally:
        launcher.terminate()
        launcher.wait(timeout=60)


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
@pytest.mark.parametrize(("kills", "preemptions", "stops"), [SHORT, LONG], ids=["short", "long"])
def test_four_processes_survive(kills, preemptions, stops, base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=1, every=SAVED_EVERY)
    events = ["kill"] * kills + ["preempt"] * preemptions + ["stop"] * stops
    steps, rng = STEPS_PER_EVENT * len(events), random.Random(SEED)
    rng.shuffle(events)
    whole, run = tmp_path / "whole", tmp_path / "run"
    with launched(config, whole, steps, hang_timeout=0) as launcher:  # It compiles the step.
        assert launcher.wait() == 0
    with launched(config, run, steps, hang_timeout=HANG_TIMEOUT) as launcher:
        for event in events:
            target = last_step(run) + rng.randint(1, STEPS_PER_EVENT // 2)
            assert until(lambda target=target: last_step(run) >= target, seconds=400), event
            started = processes_of(run)
            assert len(started) == PROCESSES and launcher.poll() is None, event
            number = {"kill": signal.SIGKILL, "preempt": signal.SIGTERM, "stop": signal.SIGSTOP}
            for process in started if event == "preempt" else [rng.choice(started)]:
                os.kill(process, number[event])
            gone = lambda started=started: not set(started) & set(processes_of(run))  # noqa: E731
            assert until(gone, seconds=HANG_TIMEOUT + 120), event
            print(f"{time.strftime('%X')} {event}: at step {last_step(run)}, saved {newest(run)}")
            if event == "preempt":
                assert newest(run) == last_step(run), "a preemption lost a step"
        assert launcher.wait(timeout=900) == 0
    log = (tmp_path / "run.log").read_text()
    assert log.count("; starting again in 0 s") == len(events)
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(state_of(workdir, config, steps)) for workdir in (run, whole)),
    )
