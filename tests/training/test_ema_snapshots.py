"""Snapshots of power-function averages: files of a run, resumed runs, unusable snapshots."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.config import overrides
from imagen_jax.config.schema import CheckpointConfig, EmaConfig, TrainConfig
from imagen_jax.interop import weights
from imagen_jax.training import ema, ema_snapshots
from imagen_jax.training.ema_snapshots import SnapshotError
from imagen_jax.training.train import train

# The narrowest average equals the parameters of its step for the first hundred steps.
WIDTHS = (0.001, 0.05, 0.1)
NAMES = ("power_0.001", "power_0.050", "power_0.100")


class Killed(Exception):
    """Simulates a killed process."""


@pytest.fixture(scope="module")
def config(base_config):
    """Seven steps, a snapshot after every one, a checkpoint after every third."""
    return dataclasses.replace(
        base_config,
        ema=EmaConfig(profiles=WIDTHS, snapshot_every=1),
        train=TrainConfig(steps=7, log_every=100),
        checkpoint=CheckpointConfig(every=3),
    )


@pytest.fixture(scope="module")
def run(config, make_batch):
    """(workdir, killed_at) -> the final state of a run, which resumes from WORKDIR."""

    def go(workdir, killed_at: int = -1):
        def batches(start: int):
            for step in range(start, 100):
                if step == killed_at:
                    raise Killed
                yield make_batch(config, seed=step)

        return train(config, str(workdir), batches, log=lambda line: None)

    return go


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """(state, workdir) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run")
    return run(workdir), workdir


def contents(workdir) -> dict[str, np.ndarray]:
    """All arrays of the snapshots, by step, average and parameter."""
    snapshots, _ = ema_snapshots.find(str(workdir))
    return {
        f"{snapshot.profile} {name}": array
        for snapshot in snapshots
        for name, array in weights.flatten(snapshot.load()).items()
    }


def test_files_of_a_run(finished, config):
    state, workdir = finished
    assert {path.name for path in (workdir / "ema").iterdir()} == {str(n) for n in range(1, 8)}
    for step in range(1, 8):
        folder = workdir / "ema" / str(step)
        assert {"averages", "config"} <= {path.name for path in folder.iterdir()}
    snapshots, saved = ema_snapshots.find(str(workdir))
    assert saved == config
    assert [s.profile for s in snapshots] == [(w, t) for t in range(1, 8) for w in WIDTHS]
    for snapshot, name in zip(snapshots[-3:], NAMES, strict=True):
        params = snapshot.load()
        assert jax.tree.structure(params) == jax.tree.structure(state.params)
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.ema[name]))


def test_a_run_averages_its_parameters(finished):
    snapshots, _ = ema_snapshots.find(str(finished[1]))
    kernels = {s.profile: s.load()["conv_out"]["kernel"].astype(np.float64) for s in snapshots}
    for width in WIDTHS[1:]:
        # The weight of an update is the integral of tau^gamma over its step.
        shares = np.diff((np.arange(8) / 7) ** (ema.power_exponent(width) + 1))
        seen = [kernels[WIDTHS[0], step] for step in range(1, 8)]
        average = sum(share * params for share, params in zip(shares, seen, strict=True))
        np.testing.assert_allclose(kernels[width, 7], average, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_killed_and_resumed_run_writes_the_same_snapshots(finished, run, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=5)  # two snapshots after the last checkpoint
    run(tmp_path)
    found, expected = contents(tmp_path), contents(finished[1])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_snapshots_of_earlier_commits_are_read(config, random_params, tmp_path):
    """One safetensors file per average, and config.json."""
    params = random_params(config)
    for step in (1, 2):
        folder = tmp_path / "ema" / str(step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(overrides.to_json(config))
        for name in NAMES:
            weights.write_safetensors(folder / f"{name}.safetensors", weights.flatten(params))
    snapshots, saved = ema_snapshots.find(str(tmp_path))
    assert saved == config and len(snapshots) == 6
    jax.tree.map(np.testing.assert_array_equal, snapshots[0].load(), params)
    path = tmp_path / "ema" / "1" / "power_0.001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SnapshotError, match=f"{path.parent} cannot be read"):
        snapshots[0].load()


def test_an_incomplete_snapshot_is_ignored(finished, tmp_path):
    state, workdir = finished
    before = ema_snapshots.find(str(workdir))[0]
    (workdir / "ema" / "9.tmp").mkdir()
    after = ema_snapshots.find(str(workdir))[0]
    (workdir / "ema" / "9.tmp").rmdir()
    assert [s.profile for s in after] == [s.profile for s in before]


def test_missing_snapshots_are_an_error(tmp_path):
    for name in ("", "nothing"):
        with pytest.raises(SnapshotError, match="profiles=.*snapshot_every="):
            ema_snapshots.find(str(tmp_path / name))


def test_unusable_snapshots_are_an_error(config, random_params, tmp_path):
    model = dataclasses.replace(config.model, channels=(16,))
    params = random_params(config)
    averages = dict.fromkeys(NAMES, params)
    ema_snapshots.save(str(tmp_path), 1, averages, dataclasses.replace(config, model=model))
    ema_snapshots.save(str(tmp_path), 2, averages, config)
    with pytest.raises(SnapshotError, match=r"ema/1 is a snapshot of another model than .*ema/2"):
        ema_snapshots.find(str(tmp_path))
    ema_snapshots.save(str(tmp_path), 1, averages, config)  # replaces it
    snapshots, _ = ema_snapshots.find(str(tmp_path))

    folder = tmp_path / "ema" / "1"
    for path in [p for p in (folder / "averages").rglob("*") if p.is_file()]:
        path.write_bytes(b"")
    with pytest.raises(SnapshotError, match=f"{folder} cannot be read"):
        snapshots[0].load()
    shutil.rmtree(folder)
    with pytest.raises(SnapshotError, match=f"{folder} cannot be read"):
        snapshots[0].load()
    (tmp_path / "ema" / "2" / "config" / "metadata").write_text("{")
    with pytest.raises(SnapshotError, match="ema/2 cannot be read"):
        ema_snapshots.find(str(tmp_path))
