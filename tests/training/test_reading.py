"""Commands that read a run change nothing in its workdir, and work while it saves.

Another number of commands than a hundred in the slow test: SOAK_COMMANDS=30 pytest -k hundred PATH
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.overrides import load
from imagen_jax.config.schema import CheckpointConfig, EmaConfig, TrainConfig
from imagen_jax.export import export
from imagen_jax.interop.weights import WeightsError
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import init_params
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state, start_from
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.replay import replay
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import block_norms
from imagen_jax.training.train import train
from tests.reference.processes import ROOT

STEPS = 16
COMMANDS = int(os.environ.get("SOAK_COMMANDS", "100"))


def quiet(line: str) -> None:
    """No log."""


@pytest.fixture(scope="module")
def config(base_config):
    """Saves at every step and keeps one checkpoint: a reader's is deleted soon."""
    return dataclasses.replace(
        base_config,
        train=TrainConfig(steps=STEPS, log_every=1),
        checkpoint=CheckpointConfig(every=1, keep=1),
        ema=EmaConfig(profiles=(0.05,), snapshot_every=STEPS // 2),
    )


@pytest.fixture(scope="module")
def stream(config, make_batch):
    """A stream whose step 3 is not finite; `before(step)` is called before a batch is made."""

    def open_stream(before=lambda step: None):
        def batches(start: int):
            for step in range(start, 10**6):
                before(step)
                batch = make_batch(config, seed=step)
                if step == 3:
                    batch["image"] = batch["image"] * np.float32(np.nan)
                yield batch

        return batches

    return open_stream


@pytest.fixture(scope="module")
def alone(config, stream, tmp_path_factory):
    """State and workdir of a run that nobody reads."""
    workdir = tmp_path_factory.mktemp("alone")
    return train(config, str(workdir), stream(), log=quiet), workdir


def restore_newest(workdir: pathlib.Path, config) -> TrainState:
    """Reads the whole state, as `doctor` does."""
    mesh = partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        _, abstract = abstract_state(config, optimizer, mesh)
        checkpoints = Checkpoints(str(workdir), config.checkpoint)
        state = checkpoints.read(
            lambda steps: steps[-1] if steps else None,
            lambda step: checkpoints.restore(step, abstract),
        )
    assert state
    return state


def with_ema(config, other):
    """`config` with the EMA settings of another configuration."""
    return dataclasses.replace(config, ema=other.ema)


def listed(workdir: pathlib.Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in [workdir, *workdir.rglob("*")]}


def test_reading_changes_nothing(alone, config, tmp_path):
    _, workdir = alone
    # The save under way of a live run.
    under_way = workdir / "checkpoints" / f"{STEPS + 1}.orbax-checkpoint-tmp"
    (under_way / "state").mkdir(parents=True)
    before = listed(workdir)
    assert export.read_average(str(workdir))[2] == STEPS
    assert Checkpoints(str(workdir), config.checkpoint).newest_config() == config
    assert int(restore_newest(workdir, config).step) == STEPS
    export.export_average(str(workdir), str(tmp_path / "stage"), sigma_rel=0.1, log=quiet)
    with pytest.raises(CheckpointError, match='access="read"'):
        Checkpoints(str(workdir), config.checkpoint).wait()
    assert listed(workdir) == before
    (under_way / "state").rmdir()
    under_way.rmdir()


@pytest.mark.slow
def test_a_run_ends_as_if_alone_beside_readers(alone, config, stream, tmp_path):
    """A run that saves at every step, and keeps one; its newest checkpoint is read all the time."""
    results, read, failed = [], [], []

    def wait_for_readers(step: int) -> None:
        # The run is faster than a read: it must not end before some have begun and ended.
        end = time.monotonic() + 60
        while step % 4 == 3 and len(read) < step // 2 and time.monotonic() < end:
            time.sleep(0.01)

    def go():
        results.append(train(config, str(tmp_path), stream(wait_for_readers), log=quiet))

    running = threading.Thread(target=go)
    running.start()
    while running.is_alive():
        try:
            read.append(export.read_average(str(tmp_path))[2])
            read.append(int(restore_newest(tmp_path, config).step))
        except CheckpointError as error:
            failed.append(str(error))
    running.join()
    # Before its first save there is nothing to read.
    assert all("no complete checkpoint" in x or "no checkpoints" in x for x in failed), failed[-1]
    assert len(set(read)) >= 3 and read == sorted(read)
    (state,) = results
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(alone[0]))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(STEPS)]


def test_a_step_that_is_deleted_is_not_read(alone):
    with pytest.raises(CheckpointError, match="--step=7 is no checkpoint of .*, which has 16"):
        export.read_average(str(alone[1]), 7)


@pytest.mark.slow
def test_a_fault_replays_without_its_checkpoint(alone, config, stream):
    """The run kept one checkpoint, a later one: the replay begins at step 0."""
    lines = []
    assert replay(config, str(alone[1]), 3, stream(), lines.append)
    assert lines[0] == "training from step 0 to step 3"


def test_a_run_starts_from_the_average_of_another(alone, config, sr_config):
    state, workdir = alone
    optimizer = make_optimizer(config.optimizer, 1)
    mesh = partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, optimizer, mesh)
        started = start_from(str(workdir), abstract, optimizer)
        _, other = abstract_state(with_ema(sr_config, config), optimizer, mesh)
        with pytest.raises(WeightsError, match="config.train.init_from=.*conv_in"):
            start_from(str(workdir), other, optimizer)
    assert int(started.step) == 0
    for tree in (started.params, *started.ema.values()):
        jax.tree.map(np.testing.assert_array_equal, tree, state.ema["ema"])


@pytest.mark.slow
def test_a_hundred_commands_beside_a_run(base_config, write_world, tmp_path, capsys, request):
    """100 exports, replays and doctors against a process that saves at every step."""
    spec = write_world(tmp_path, base_config, steps=100_000, every=1)
    workdir, environment = tmp_path / "run", {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={spec}"]

    def start(folder: pathlib.Path, *more: str) -> subprocess.Popen:
        flags = [f"--workdir={folder}", "--config.checkpoint.keep=3", *more]
        return subprocess.Popen(
            [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )

    running = start(workdir)
    request.addfinalizer(running.kill)
    while not list(workdir.glob("checkpoints/[0-9]*/config/metadata")):
        assert running.poll() is None
        time.sleep(0.1)
    # A fault to replay: the facts of any step serve.
    blocks = block_norms(partitioning.unbox(init_params(base_config, jax.random.key(0))))
    fault = {"step": 1, "loss": "nan", "rows": [], "batch": {}}
    fault["block_norms"] = dict.fromkeys(blocks, "nan")
    (workdir / "faults").mkdir(exist_ok=True)
    (workdir / "faults" / "00000001.json").write_text(json.dumps(fault))
    verbs = [
        ["export", f"--out={tmp_path / 'stage'}"],
        ["replay", "--step=1"],
        ["doctor", f"--config={spec}"],
    ]
    for number in range(COMMANDS):
        status = main.main([*verbs[number % 3], f"--workdir={workdir}"])
        assert status == 0, (verbs[number % 3], capsys.readouterr())
        assert running.poll() is None, "the run has died"
    running.terminate()
    assert running.wait(timeout=120) == 75
    step = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    whole = ["--config.checkpoint.every=1000000", f"--config.train.steps={step}"]
    assert start(tmp_path / "whole", *whole).wait() == 0
    metrics = [
        [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").open())]
        for folder in (workdir, tmp_path / "whole")
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == step
    config = load(str(spec), [f"model.text_dim={base_config.model.text_dim}"])
    read, alone = (restore_newest(folder, config) for folder in (workdir, tmp_path / "whole"))
    assert int(read.step) == step
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), jax.device_get(alone))
