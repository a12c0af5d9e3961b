"""Runs with several processes over loopback equal single-process runs and resume each other."""

import json
import pathlib
import signal
import sys
import time

import numpy as np
import pytest

from imagen_jax.cli.wiring import open_pipeline
from imagen_jax.config.overrides import load
from imagen_jax.parallel.preemption import RESTART
from imagen_jax.training.train import train
from tests.reference.processes import finish
from tests.reference.processes import start as start_processes

SOURCE = pathlib.Path(__file__).parents[2]
# Relative difference of a float32 loss (mean over 4 images of 64 pixels) by order of summation.
LOSS_TOLERANCE = 2e-5


def start(processes: int, devices: int, config: pathlib.Path, workdir: pathlib.Path, *more: str):
    """Starts the processes of one training run, each with `devices` devices."""
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    return start_processes([*command, f"--workdir={workdir}", *more], processes, devices)


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def kill_after(started, workdir: pathlib.Path, step: int, number: int) -> list[int]:
    """Signals all processes once `step` has been reported; returns their exit codes."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= step for row in rows(workdir)):
            break
        assert all(process.poll() is None for process in started), started[0].communicate()[0]
        time.sleep(0.02)
    for process in started:
        process.send_signal(number)
    codes = []
    for process in started:
        process.communicate(timeout=240)
        codes.append(process.returncode)
    return codes


@pytest.fixture(scope="module")
def world(base_config, write_world, tmp_path_factory) -> pathlib.Path:
    """A configuration file of 50 steps on a folder of images, saved every 10."""
    return write_world(tmp_path_factory.mktemp("world"), base_config, steps=50, every=10)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> pathlib.Path:
    """The workdir of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(start(1, 1, world, workdir))
    return workdir


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """The runs have the same steps and, up to the order of summation, the same losses."""
    assert [row["step"] for row in rows(workdir)] == [row["step"] for row in rows(other)]
    for row, expected in zip(rows(workdir), rows(other), strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=LOSS_TOLERANCE, atol=1e-6)


def test_two_processes_equal_one(world, alone, tmp_path):
    """Each process stands for a slice."""
    output = finish(start(2, 2, world, tmp_path, "--config.mesh.dcn_data=2"))
    assert "parameters on 4 cpu" in output
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_two_slices_write_previews(world, tmp_path):
    short = ("--config.train.steps=2", "--config.train.sample_every=1")
    finish(start(2, 2, world, tmp_path, "--config.mesh.dcn_data=2", *short))
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert written.count(b"\x89PNG") == 2


@pytest.mark.slow
def test_four_devices_equal_one(world, alone, tmp_path):
    finish(start(1, 4, world, tmp_path))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_a_run_resumes_on_fewer_hosts(world, alone, tmp_path):
    codes = kill_after(start(4, 1, world, tmp_path), tmp_path, 15, signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * 4
    codes = kill_after(start(2, 2, world, tmp_path), tmp_path, 30, signal.SIGTERM)
    assert codes == [RESTART] * 2
    output = finish(start(1, 1, world, tmp_path))
    assert "going on from step" in output
    assert_same_run(tmp_path, alone)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 51))


@pytest.mark.slow
def test_fsdp_over_processes_equals_one_process(world, alone, tmp_path):
    finish(start(2, 2, world, tmp_path, "--config.mesh.fsdp=4", "--config.mesh.data=1"))
    assert_same_run(tmp_path, alone)


def test_data_order_is_the_same_for_any_number_of_hosts(world):
    pipeline = open_pipeline(load(str(world), ["model.text_dim=8"]))
    for step in (0, 3, 17):
        global_batch = pipeline.batch_at(step)
        for hosts in (2, 4):
            parts = [pipeline.part(h, hosts).batch_at(step) for h in range(hosts)]
            for name, value in global_batch.items():
                together = np.concatenate([part[name] for part in parts])
                np.testing.assert_array_equal(together, value)


@pytest.mark.slow
def test_a_state_saved_by_two_processes_is_restored_by_one(world, alone, tmp_path):
    finish(start(2, 1, world, tmp_path, "--config.train.steps=10"))
    config = load(str(world), ["model.text_dim=8", "train.steps=10"])
    state = train(config, str(tmp_path), lambda step: (), lambda line: None)
    assert int(state.step) == 10
