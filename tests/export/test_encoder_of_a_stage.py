"""A stage folder has its text encoder, or the export says where it is, or fails."""

import dataclasses

import pytest

from imagen_jax.cli import main
from imagen_jax.config.schema import CheckpointConfig, EmaConfig, TrainConfig
from imagen_jax.stages.folder import load_stage
from imagen_jax.training.train import train

ENCODER_FILES = {"config.json": "{}", "model.safetensors": "x", "spiece.model": "y"}


@pytest.fixture(scope="module")
def run(base_config, make_batch, tmp_path_factory):
    """Folder of a run that was started there, with runs/text as its encoder."""
    root = tmp_path_factory.mktemp("project")
    (root / "runs" / "text").mkdir(parents=True)
    for name, content in ENCODER_FILES.items():
        (root / "runs" / "text" / name).write_text(content)
    config = dataclasses.replace(
        base_config,
        text=dataclasses.replace(base_config.text, path="runs/text"),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig(every=2),
        ema=EmaConfig(profiles=(0.1,), snapshot_every=1),
    )
    batches = [make_batch(config, seed=step) for step in range(2)]
    train(config, str(root / "runs/base"), lambda start: batches[start:], log=lambda line: None)
    return root


def verbs(out, workdir):
    yield ["export", f"--workdir={workdir}", f"--out={out}"]
    yield ["ema", f"--workdir={workdir}", f"--out={out}", "--sigma_rel=0.1"]


def test_from_the_folder_of_the_training(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    for number, command in enumerate(verbs(tmp_path / "stage", "runs/base")):
        assert main.main(command) == 0, number
        assert (tmp_path / "stage" / "text" / "model.safetensors").read_text() == "x"


@pytest.mark.parametrize("where", ["elsewhere", "runs", "runs/base", "."])
def test_from_another_folder_it_is_no_success(run, tmp_path, monkeypatch, capsys, where):
    other = tmp_path / "elsewhere" if where == "elsewhere" else run / where
    other.mkdir(exist_ok=True)
    monkeypatch.chdir(other)
    if where == ".":  # The encoder has moved since.
        (run / "runs" / "text").rename(run / "runs" / "moved")
    try:
        for command in verbs(tmp_path / "stage", run / "runs/base"):
            assert main.main(command) == 1
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and "text encoder 'runs/text' is no folder here" in lines[0]
            assert "--text_encoder=DIR" in lines[0] and not (tmp_path / "stage").exists()
    finally:
        if where == ".":
            (run / "runs" / "moved").rename(run / "runs" / "text")
    for command in verbs(tmp_path / "stage", run / "runs/base"):
        assert main.main([*command, f"--text_encoder={run}/runs/text"]) == 0
        stage = load_stage(str(tmp_path / "stage"))
        assert stage.config.text.path == str(tmp_path / "stage" / "text")


def test_what_is_not_copied_is_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run)
    monkeypatch.setattr("imagen_jax.stages.folder.MAX_COPIED_ENCODER_BYTES", 1)
    assert main.main(["export", "--workdir=runs/base", f"--out={tmp_path}/stage"]) == 0
    assert f"the text encoder stays in {run}/runs/text" in capsys.readouterr().out
    wrong = ["export", "--workdir=runs/base", f"--out={tmp_path}/stage", "--text_encoder=nowhere"]
    assert main.main(wrong) == 1
    assert "text encoder 'nowhere' is no folder" in capsys.readouterr().err
