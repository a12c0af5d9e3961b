"""Stage folders from checkpoints (`export`) and from snapshots of averages (`ema`)."""

import dataclasses

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.schema import CheckpointConfig, EmaConfig, TrainConfig
from imagen_jax.export import export
from imagen_jax.inference.cascade import Cascade
from imagen_jax.interop import weights
from imagen_jax.parallel import partitioning
from imagen_jax.stages.folder import load_stage, write_stage
from imagen_jax.training.initial_state import abstract_state, start_from
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.train import train


@pytest.fixture(scope="module")
def trained(base_config, make_batch, tmp_path_factory):
    """(state, workdir) of five steps with snapshots after steps 2, 4 and 5."""
    workdir = tmp_path_factory.mktemp("run")
    averages = EmaConfig(profiles=(0.05, 0.1), snapshot_every=2)
    config = dataclasses.replace(base_config, ema=averages, train=TrainConfig(steps=5))
    batches = [make_batch(config, seed=step) for step in range(5)]
    return train(config, str(workdir), lambda start: batches, log=lambda line: None), workdir


def ema_verb(workdir, out, *flags: str) -> int:
    return main.main(["ema", f"--workdir={workdir}", f"--out={out}", *flags])


def test_a_tracked_average_is_exported_unchanged(trained, tmp_path, capsys):
    state, workdir = trained
    assert ema_verb(workdir, tmp_path / "stage", "--sigma_rel=0.1") == 0
    stage = load_stage(str(tmp_path / "stage"))
    target = jax.device_get(state.ema["power_0.100"])
    for got, expected in zip(jax.tree.leaves(stage.params), jax.tree.leaves(target), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
    line = "power-function average, sigma_rel 0.1, fitted within 0.00% by 6 snapshots"
    assert line in capsys.readouterr().out
    card = (tmp_path / "stage" / "card.md").read_text()
    assert line in card and "5 steps of 4 images" in card


def test_other_widths_sample_other_images(trained, tmp_path):
    folders = [str(tmp_path / name) for name in ("narrow", "wide", "early")]
    flags = (["--sigma_rel=0.04"], ["--sigma_rel=0.25"], ["--sigma_rel=0.25", "--step=3"])
    for folder, more in zip(folders, flags, strict=True):
        assert ema_verb(trained[1], folder, *more) == 0
    text = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    sampled = []
    for folder in folders:
        chain = Cascade([load_stage(folder)])
        sampled.append(chain.sample(text_emb=text, text_mask=np.ones((2, 4), bool)))
    assert all(batch.shape == (2, 8, 8, 3) and batch.std() > 1 for batch in sampled)
    assert (sampled[0] != sampled[1]).any() and (sampled[1] != sampled[2]).any()
    card = (tmp_path / "early" / "card.md").read_text()
    assert "3 steps of 4 images" in card and "by 4 snapshots" in card


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sigma_rel=0.3"], "--sigma_rel=0.3 must be a relative width above 0 and below 0.28"),
        (["--sigma_rel=0"], "--sigma_rel=0.0 must be a relative width above 0"),
        (["--sigma_rel=0.1", "--step=6"], "--step=6 must be a step from 1 to 5, the last snapshot"),
        (["--sigma_rel=0.1", "--step=0"], "--step=0 must be a step from 1 to 5"),
    ],
)
def test_invalid_flags_are_rejected(trained, tmp_path, capsys, flags, says):
    assert ema_verb(trained[1], tmp_path / "stage", *flags) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith(f"imagen ema: {says}")
    assert not (tmp_path / "stage").exists()


def test_an_older_checkpoint_is_exported(base_config, make_batch, tmp_path, capsys):
    config = dataclasses.replace(
        base_config, checkpoint=CheckpointConfig(every=2), train=TrainConfig(steps=4)
    )
    batches = [make_batch(config, seed=step) for step in range(4)]
    for steps in (2, 4):
        shorter = dataclasses.replace(config, train=TrainConfig(steps=steps))
        run_to = str(tmp_path / f"run_{steps}")
        train(shorter, run_to, lambda start, n=steps: batches[start:n], log=lambda line: None)
    newest, older, same = (str(tmp_path / name) for name in ("newest", "older", "same"))
    export.export(str(tmp_path / "run_4"), newest, log=lambda line: None)
    export.export(str(tmp_path / "run_4"), older, step=2, log=lambda line: None)
    export.export(str(tmp_path / "run_2"), same, log=lambda line: None)
    params = [jax.tree.leaves(load_stage(f).params) for f in (newest, older, same)]
    assert any((a != b).any() for a, b in zip(params[0], params[1], strict=True))
    for got, expected in zip(params[1], params[2], strict=True):
        np.testing.assert_array_equal(got, expected)

    flags = [f"--workdir={tmp_path / 'run_4'}", f"--out={tmp_path / 'none'}"]
    assert main.main(["export", *flags, "--step=3"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--step=3 is no checkpoint of" in error
    assert "which has 2, 4" in error and not (tmp_path / "none").exists()


def test_other_folders_are_rejected(trained, tmp_path, capsys):
    assert ema_verb(tmp_path, tmp_path / "stage", "--sigma_rel=0.1") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "has no snapshots of averages" in error
    assert "--config.ema.profiles=(0.05,0.1) --config.ema.snapshot_every=STEPS" in error

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear reader")
    assert ema_verb(trained[1], tmp_path / "letters", "--sigma_rel=0.1") == 1
    assert "is no stage folder" in capsys.readouterr().err
    assert (tmp_path / "letters" / "a.txt").exists()


def test_a_run_starts_from_a_stage(base_config, random_params, tmp_path):
    stage = random_params(base_config)
    write_stage(tmp_path / "stage", stage, base_config, {})
    optimizer = make_optimizer(base_config.optimizer, 1)
    mesh = partitioning.make_mesh(base_config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(base_config, optimizer, mesh)
        state = start_from(str(tmp_path / "stage"), abstract, optimizer)
    assert jax.tree.structure(state) == jax.tree.structure(abstract) and int(state.step) == 0
    for tree in (state.params, state.ema["ema"]):
        for got, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(stage), strict=True):
            np.testing.assert_array_equal(got, expected)

    write_stage(tmp_path / "stage", {"conv_in": stage["conv_in"]}, base_config, {})
    with pytest.raises(weights.WeightsError, match="config.train.init_from=.*missing: cond/noise"):
        start_from(str(tmp_path / "stage"), abstract, optimizer)
