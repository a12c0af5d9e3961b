"""Preemption, non-finite updates, failed saves, changed settings, gradient accumulation."""

import dataclasses
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import CheckpointConfig, Config, TrainConfig
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.preemption import Preempted
from imagen_jax.stages.loss import loss_fn, sample_randomness
from imagen_jax.stages.network import init_params
from imagen_jax.training import faults
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.faults import DivergedError
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.replay import replay
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.state import create_state
from imagen_jax.training.step import gradient_of_batch, make_train_step, step_key, step_timesteps
from imagen_jax.training.train import train

SOURCE = pathlib.Path(__file__).parents[2]


def with_train(config: Config, **changes) -> Config:
    settings = {"steps": 6, "log_every": 1, **changes}
    return dataclasses.replace(config, train=TrainConfig(**settings))


def assert_same(a, b) -> None:
    """The leaves of two trees are equal bit for bit."""
    for (path, x), (_, y) in zip(
        *(jax.tree_util.tree_leaves_with_path(jax.device_get(tree)) for tree in (a, b)), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def finished(base_config, stream, tmp_path_factory):
    """The state of an uninterrupted run of six steps."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    return train(with_train(base_config), workdir, stream(base_config), lambda line: None)


def on_device(batch):
    return {name: jax.numpy.asarray(array) for name, array in batch.items()}


def spoil(*steps):
    """A change that makes the images of some steps NaN."""

    def change(step, batch):
        bad = {**batch, "image": batch["image"] * np.float32(np.nan)}
        return bad if step in steps else batch

    return change


def test_sigterm_saves_the_step_and_the_run_resumes_from_it(
    base_config, stream, finished, tmp_path
):
    def terminate_at(target):
        return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == target else None

    config, before = with_train(base_config), signal.getsignal(signal.SIGTERM)
    for target, saved in ((0, 1), (3, 4)):
        with pytest.raises(Preempted, match=f"saved at step {saved}"):
            train(config, str(tmp_path), stream(config, event=terminate_at(target)))
        assert signal.getsignal(signal.SIGTERM) is before
    lines = []
    state = train(config, str(tmp_path), stream(config), lines.append)
    assert "going on from step 4" in lines
    assert_same(state, finished)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_non_finite_batch_is_saved_and_reproduced(base_config, stream, tmp_path):
    config, lines = with_train(base_config, steps=5), []
    change = spoil(2)
    state = train(
        config,
        str(tmp_path),
        stream(config, change),
        lines.append,
        step_info=lambda step: {"records": [10 * step + i for i in range(4)]},
    )
    assert (int(state.step), int(state.skipped)) == (5, 1)
    assert sum("not finite" in line for line in lines) == 1
    values = faults.read(str(tmp_path), 2)
    assert values["rows"] == [0, 1, 2, 3] and values["loss"] == "nan"
    assert values["records"] == [20, 21, 22, 23]
    assert values["block_norms"]["conv_out"] == "nan"
    assert len(values["time"]) == 4 and all(0 <= time <= 1 for time in values["time"])
    assert values["batch"]["image"]["norm"] == ["nan"] * 4
    assert all(norm > 0 for norm in values["batch"]["text_emb"]["norm"])
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["00000002.json"]

    report = []
    assert replay(config, str(tmp_path), 2, stream(config, change), report.append)
    assert report[0] == "training from step 2 to step 2" and report[-1].startswith("reproduced")
    assert "record 21" in report[2] and "not finite in the batch: image" in report[2]


def test_a_hardware_fault_is_not_reproduced(base_config, stream, tmp_path):
    config = with_train(base_config, steps=5)
    train(config, str(tmp_path), stream(config, spoil(3)), lambda line: None)
    # Simulates failed memory: the data are finite when they are read again.
    report = []
    assert not replay(config, str(tmp_path), 3, stream(config), report.append)
    assert report[0] == "training from step 2 to step 3"
    assert report[1] == "row 0: image differs from the run's, whose norm was nan"
    assert report[-1].startswith("not reproduced")
    with pytest.raises(DivergedError, match="--step=4: no such fault.*saved faults: 3"):
        replay(config, str(tmp_path), 4, stream(config))


@pytest.mark.slow
def test_ten_consecutive_faults_roll_back_once_then_stop(base_config, stream, tmp_path):
    config = with_train(base_config, steps=30)
    steps, lines = [], []
    change = spoil(*range(7, 40))
    batches = stream(config, change, event=steps.append)
    with pytest.raises(DivergedError, match="10 steps in a row were not finite.*after 1 roll-back"):
        train(config, str(tmp_path), batches, lines.append)
    assert sum("10 in a row" in line for line in lines) == 2
    # Of the kept checkpoints 12, 14 and 16 none is from before step 7, the first bad one.
    assert [line for line in lines if "going on" in line] == ["going on from step 12"]
    assert steps == [*range(18), *range(17, 28)]


def test_fewer_faults_than_the_patience_do_not_roll_back(base_config, stream, tmp_path):
    config = with_train(base_config, steps=12, nan_patience=3)
    lines = []
    state = train(config, str(tmp_path), stream(config, spoil(2, 3, 5, 6, 8, 9)), lines.append)
    assert (int(state.step), int(state.skipped)) == (12, 6)
    assert not any("going on from" in line for line in lines)


def run_command(config, workdir, *, largest_file: int | None = None) -> subprocess.CompletedProcess:
    """`imagen train` in a subprocess, optionally with a limit on file size in bytes."""

    def limit():
        if largest_file:
            # A write then fails in the middle of a save, as on a full disk, without a signal.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in os.environ.items():
        # Coverage measurement would fail to write its own files.
        if not (largest_file and name.startswith("COVERAGE_")):
            environment.setdefault(name, value)
    return subprocess.run(
        [sys.executable, "-m", "imagen_jax", "train", f"--config={config}", f"--workdir={workdir}"],
        cwd=SOURCE,
        env=environment,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )


def test_a_failed_save_prints_one_line_and_the_run_can_restart(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=4, every=2)
    full = run_command(config, tmp_path / "run", largest_file=16_000)
    assert full.returncode == 1
    (error,) = [line for line in full.stderr.splitlines() if "warning:" not in line]
    assert error.startswith("imagen train: ")
    assert "cannot save" in error and "free disk space" in error and "ailed" in error
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == []
    assert run_command(config, tmp_path / "run").returncode == 0
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_a_save_without_disk_space_is_not_started(base_config, stream, tmp_path, monkeypatch):
    config, free = with_train(base_config), iter([10**9, 1_000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    with pytest.raises(CheckpointError, match="0.0 MB are free, 2.1 MB are needed") as refused:
        train(config, str(tmp_path), stream(config), lambda line: None)
    assert "the newest is of step 2" in str(refused.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_an_unwritable_workdir_is_an_error(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=4, every=2)
    refused = run_command(config, "/proc/run")
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("imagen train: --workdir=/proc/run cannot be written")


@pytest.mark.parametrize(
    ("section", "change", "refused"),
    [
        ("optimizer", {"learning_rate": 1e-3}, "optimizer.learning_rate=0.001"),
        ("diffusion", {"cond_drop_prob": 0.2}, "diffusion.cond_drop_prob=0.2"),
        ("data", {"batch_size": 8}, "data.batch_size=8"),
        ("data", {"loader": "numpy", "path": "elsewhere"}, None),
        ("mesh", {"data": 1}, None),
        ("sampling", {"steps": 9}, None),
        ("checkpoint", {"every": 1}, None),
        ("train", {"steps": 9}, None),
    ],
)
def test_changes_that_affect_learning_must_be_allowed(section, change, refused, base_config):
    other = dataclasses.replace(
        base_config,
        **{section: dataclasses.replace(getattr(base_config, section), **change)},
    )
    changed = overrides.changes(base_config, other)
    if refused is None:
        assert changed == {}
    else:
        ((path, (old, new)),) = changed.items()
        assert f"{path}={new}" == refused and old != new
        assert overrides.matches_any_field(path, [section]) and overrides.matches_any_field(
            path, [path]
        )
        assert not overrides.matches_any_field(path, ["name"])


def test_steps_affect_learning_if_the_schedule_depends_on_them(base_config):
    cosine = dataclasses.replace(
        base_config, optimizer=dataclasses.replace(base_config.optimizer, schedule="cosine")
    )
    assert "train.steps" in overrides.changes(cosine, with_train(cosine, steps=7))


def test_a_run_rejects_another_learning_rate(base_config, stream, tmp_path):
    config = with_train(base_config, steps=2)
    train(config, str(tmp_path), stream(config), lambda line: None)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3)
    # What the Efficient U-Net uses for None.
    model = dataclasses.replace(config.model, skip_scale=2**-0.5)
    other = dataclasses.replace(with_train(config, steps=4), optimizer=optimizer, model=model)
    with pytest.raises(ConfigError, match="config.optimizer.learning_rate=0.001.*0.003.*allow_ch"):
        train(other, str(tmp_path), stream(other))
    allowed = ["optimizer.learning_rate"]
    assert int(train(other, str(tmp_path), stream(other), allow_changes=allowed).step) == 4


def test_which_checkpoints_are_kept(base_config, tmp_path):
    optimizer = make_optimizer(base_config.optimizer, 10)
    params = partitioning.unbox(init_params(base_config, jax.random.key(0)))
    state = create_state(params, optimizer)
    settings = CheckpointConfig(keep=2, keep_every=4, keep_best=1)
    checkpoints = Checkpoints(str(tmp_path), settings, access="write")
    losses = [9.0, 8.0, 1.0, 7.0, 6.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, state, base_config, {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 8, 9, 10]
    checkpoints.close()


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage_name", ["base", "sr"])
def test_an_accumulated_gradient_equals_that_of_one_batch(
    parts, stage_name, base_config, sr_config, make_batch, random_params
):
    config = {"base": base_config, "sr": sr_config}[stage_name]
    params, key = random_params(config), step_key(config, 3)
    batch = on_device(make_batch(config))

    def gradient(accumulation: int):
        settings = with_train(config, accumulation=accumulation)
        return jax.jit(lambda: gradient_of_batch(params, batch, key, settings))()

    (whole, report), (summed, again) = gradient(1), gradient(parts)
    np.testing.assert_allclose(again["loss"], report["loss"], rtol=1e-5)
    np.testing.assert_allclose(
        again["loss_by_noise_level"], report["loss_by_noise_level"], rtol=1e-4, atol=1e-5
    )
    for (path, x), (_, y) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (whole, summed)), strict=True
    ):
        scale = max(float(np.abs(x).max()), 1e-6)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, atol=2e-5 * scale, rtol=0, err_msg=name)


def test_a_batch_that_does_not_divide_into_parts_is_rejected(base_config, stream, tmp_path):
    config = with_train(base_config, accumulation=3)
    with pytest.raises(ConfigError, match="data.batch_size=4 must be a multiple of 3.*try 3"):
        train(config, str(tmp_path), stream(config))


def test_losses_by_noise_level_cover_every_example(base_config, make_batch, random_params):
    batch = on_device(make_batch(base_config))
    params = jax.tree.map(jax.numpy.asarray, random_params(base_config))
    loss, report = loss_fn(params, batch, jax.random.key(0), base_config)
    total, count = report["loss_by_noise_level"]
    assert float(count.sum()) == base_config.data.batch_size
    np.testing.assert_allclose(float(total.sum() / count.sum()), float(loss), rtol=1e-5)


def test_one_batch_can_be_overfitted(base_config, stream, tmp_path):
    config = with_train(base_config, steps=40, overfit_batch=True)
    steps, lines = [], []
    train(config, str(tmp_path), stream(config, event=steps.append), lines.append)
    assert steps == [0]
    assert (tmp_path / "overfit.png").is_file() and "overfit.png" in lines[-2]


def test_the_step_reports_the_loss_and_the_gradient_norm(base_config, make_batch, random_params):
    optimizer = make_optimizer(base_config.optimizer, 10)
    params = jax.tree.map(jax.numpy.asarray, random_params(base_config))
    state = create_state(params, optimizer)
    batch = on_device(make_batch(base_config))
    _, report = jax.jit(make_train_step(base_config, optimizer))(state, batch)
    loss, _ = loss_fn(state.params, batch, step_key(base_config, 0), base_config)
    np.testing.assert_allclose(float(report["loss"]), float(loss), rtol=1e-6)
    squares = [float(norm) ** 2 for norm in report["block_norms"].values()]
    np.testing.assert_allclose(sum(squares) ** 0.5, float(report["grad_norm"]), rtol=1e-5)


def test_faults_of_many_processes_are_ordered_by_row(tmp_path):
    """Twelve processes, whose file names sort as 0, 1, 10, 11, 2, and two replicas of a row."""
    folder = tmp_path / "faults"
    folder.mkdir()
    for process in range(12):
        rows = [11 - process, (11 - process + 1) % 12]
        part = {
            "step": 7,
            "loss": "nan",
            "rows": rows,
            "records": [100 + row for row in rows],
            "time": [row / 12 for row in range(12)],
            "block_norms": {},
            "batch": {"image": {"sha256": [f"{row:x}" for row in rows], "norm": rows}},
        }
        (folder / f"00000007.{process}.json").write_text(json.dumps(part))
    values = faults.read(str(tmp_path), 7)
    assert values["rows"] == list(range(12))
    assert values["records"] == [100 + row for row in range(12)]
    assert values["batch"]["image"]["norm"] == list(range(12))


def test_timesteps_are_those_of_the_whole_randomness(base_config, sr_config):
    for config in (base_config, sr_config):
        key = step_key(config, 5)
        whole = sample_randomness(key, config.data.batch_size, config)
        np.testing.assert_array_equal(step_timesteps(config, 5), np.asarray(whole["time"]))


def test_a_roll_back_does_not_keep_the_old_state(base_config, stream, tmp_path, monkeypatch):
    """Parameters and averages exist once in memory when the checkpoint is read."""
    config = with_train(base_config, steps=14, nan_patience=2)
    copies, restore = [], Checkpoints.restore_newest

    def counting(self, abstract, check, log, *, last):
        gc.collect()
        shape = abstract.params["conv_in"]["kernel"].shape
        copies.append(sum(array.shape == shape for array in jax.live_arrays()))
        return restore(self, abstract, check, log, last=last)

    monkeypatch.setattr(Checkpoints, "restore_newest", counting)
    with pytest.raises(DivergedError):
        train(config, str(tmp_path), stream(config, spoil(*range(5, 14))), lambda line: None)
    assert len(copies) == 2 and copies[1] == copies[0], copies
