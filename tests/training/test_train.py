"""Training runs: they learn, resume bit for bit, and skip non-finite updates."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.overrides import load
from imagen_jax.config.schema import CheckpointConfig, Config, TrainConfig
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.train import train

SOURCE = pathlib.Path(__file__).parents[2]


class Killed(Exception):
    """Simulates a killed process."""


def with_steps(config: Config, steps: int, every: int = 2) -> Config:
    return dataclasses.replace(
        config,
        train=TrainConfig(steps=steps, log_every=1),
        checkpoint=CheckpointConfig(every=every),
    )


def assert_same(a, b) -> None:
    """The leaves of two trees are equal bit for bit."""
    a, b = (jax.tree_util.tree_leaves_with_path(jax.device_get(tree)) for tree in (a, b))
    assert len(a) == len(b)
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stream(make_batch):
    """(config, killed_at, change) -> a stream with a different batch for every step."""

    def open_stream(config: Config, killed_at: int = -1, change=lambda step, batch: batch):
        def batches(start: int):
            for step in range(start, 10**9):
                if step == killed_at:
                    raise Killed
                yield change(step, make_batch(config, seed=step))

        return batches

    return open_stream


@pytest.fixture(scope="module")
def finished(base_config, stream, tmp_path_factory):
    """(state, workdir) of an uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("run")
    return train(base_config, str(workdir), stream(base_config), log=lambda line: None), workdir


@pytest.fixture(scope="module")
def eight_steps(base_config, stream, tmp_path_factory):
    """The state of an uninterrupted run of eight steps."""
    workdir = str(tmp_path_factory.mktemp("eight"))
    return train(with_steps(base_config, 8), workdir, stream(base_config), lambda line: None)


def test_state_and_files_of_a_run(finished, base_config):
    state, workdir = finished
    assert int(state.step) == 6 and int(state.skipped) == 0
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "x0_mse", "grad_norm", "learning_rate", "images_per_second"} <= set(
        rows(workdir)[0]
    )
    kept = {p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"2", "4", "6"}
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, state.ema["ema"])
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    finished, base_config, stream, tmp_path
):
    lines = []
    for killed_at in (3, 5):
        with pytest.raises(Killed):
            train(base_config, str(tmp_path), stream(base_config, killed_at), log=lines.append)
    state = train(base_config, str(tmp_path), stream(base_config), log=lines.append)
    assert "going on from step 2" in lines and "going on from step 4" in lines
    assert_same(state, finished[0])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(rows(tmp_path), rows(finished[1]), strict=True):
        assert row["loss"] == expected["loss"] and row["grad_norm"] == expected["grad_norm"]


def test_a_finished_run_is_not_changed(finished, base_config, tmp_path):
    state, workdir = finished
    again = train(base_config, str(workdir), lambda start: pytest.fail("read data"))
    assert_same(again, state)


def test_loss_falls_on_a_repeated_batch(base_config, stream, make_batch, tmp_path):
    config = with_steps(base_config, 80, every=10**6)
    batch = make_batch(base_config)
    train(config, str(tmp_path), stream(config, change=lambda *_: batch), log=lambda line: None)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_non_finite_update_is_skipped_and_counted(base_config, stream, tmp_path):
    def spoil(step, batch):
        return {**batch, "image": batch["image"] * np.float32(np.nan)} if step == 1 else batch

    def run(steps: int):
        config = with_steps(base_config, steps, 1)
        return train(config, str(tmp_path), stream(base_config, change=spoil))

    before, spoiled, after = run(1), run(2), run(3)
    assert (int(spoiled.step), int(spoiled.skipped)) == (2, 1)
    for part in ("params", "ema", "opt_state"):
        assert_same(getattr(before, part), getattr(spoiled, part))
    assert int(after.skipped) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(after.params)))
    assert not np.array_equal(after.params["conv_out"]["bias"], before.params["conv_out"]["bias"])


@pytest.mark.parametrize("damage", ["emptied", "garbled", "state removed"])
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_used(
    finished, eight_steps, base_config, stream, tmp_path, damage
):
    shutil.copytree(finished[1], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6"
    if damage == "state removed":
        shutil.rmtree(newest / "state")
    else:
        for path in [p for p in newest.rglob("*") if p.is_file()]:
            path.write_bytes(
                b"" if damage == "emptied" else b"\x00\xff" * (path.stat().st_size // 2)
            )
    lines = []
    state = train(
        with_steps(base_config, 8), str(tmp_path / "run"), stream(base_config), lines.append
    )
    assert any(str(newest) in line and "cannot be read" in line for line in lines) or any(
        str(newest) in line and "no readable state" in line for line in lines
    )
    assert "going on from step 4" in lines
    assert newest.with_name("6.broken").is_dir() and newest.is_dir()
    assert_same(state, eight_steps)


def test_only_damaged_checkpoints_are_an_error(finished, base_config, stream, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/run/checkpoints/6"):
        train(base_config, str(tmp_path / "run"), stream(base_config))


def test_a_checkpoint_of_another_model_names_the_parameters(finished, base_config, stream):
    model = dataclasses.replace(base_config.model, channels=(16,), cross_attention=(False,))
    other = dataclasses.replace(base_config, model=model)
    with pytest.raises(ConfigError, match="config.model.channels=.*--allow_changes=model.channels"):
        train(other, str(finished[1]), stream(other))
    with pytest.raises(CheckpointError, match="of another model") as error:
        train(other, str(finished[1]), stream(other), allow_changes=["model"])
    message = str(error.value)
    assert (
        "['conv_in']['kernel'] has shape (3, 3, 3, 8), the model expects (3, 3, 3, 16)" in message
    )
    assert "unexpected ['down_0_attention_self']['text_key_value']['kernel']" in message


def test_a_mesh_that_does_not_fit_the_devices_is_rejected(base_config, stream, tmp_path):
    mesh = dataclasses.replace(base_config.mesh, fsdp=3)
    with pytest.raises(ConfigError, match="config.mesh"):
        train(dataclasses.replace(base_config, mesh=mesh), str(tmp_path), stream(base_config))


@pytest.mark.slow
def test_a_run_killed_three_times_equals_an_uninterrupted_one(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=300, every=10)
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def start(workdir: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
        return subprocess.Popen(
            [*command, f"--workdir={tmp_path / workdir}"], cwd=SOURCE, env=environment
        )

    assert start("whole").wait() == 0
    rng = random.Random(0)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for kill in range(3):
        process = start("killed")
        target = 40 + 80 * kill  # step after which the process is killed
        while process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > target:
                time.sleep(rng.uniform(0.0, 0.2))
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert start("killed").wait() == 0

    states = [
        train(load(str(config), ["model.text_dim=8"]), str(tmp_path / name), lambda start: ())
        for name in ("whole", "killed")
    ]
    assert_same(*states)
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 301))
    for row, expected in zip(rows(tmp_path / "killed"), rows(tmp_path / "whole"), strict=True):
        assert row["loss"] == expected["loss"]
