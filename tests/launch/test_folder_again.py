"""launch/folder.sh: sizes and steps, and a second start: text encoder and steps stay."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ["export", "export", "train", "train"]


@pytest.mark.parametrize("flag", ["--allow_changes", "--allow-changes"])
def test_changes_are_allowed_in_training_alone(tools, tmp_path, flag):
    path = tools(python=f'[ "$1" = -c ] && echo cpu True || echo "$@" >>{tmp_path}/calls')
    run = tmp_path / "my run"
    (run / "text").mkdir(parents=True)
    (run / "text" / "pretrain.json").write_text("{}")
    (run / "prompts.jsonl").touch()
    words = [f"{flag}=data.fingerprint", "--config.train.steps=9"]
    done = subprocess.run(
        ["bash", "launch/folder.sh", "images", run, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(path / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"text encoder in {run}/text is kept" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    verbs = [line.split()[2] for line in calls]
    # The two trainings run at the same time.
    assert (verbs[:2], sorted(verbs[2:6]), verbs[6:]) == (["prepare", "embed"], STAGES, ["sample"])
    for verb, line in zip(verbs, calls, strict=True):
        assert (words[0] in line) == (verb == "train"), line
        assert (words[1] in line) == (verb not in ("export", "sample")), line
    assert "The base stage trains for 9 steps, super-resolution for 9" in done.stdout


@pytest.mark.parametrize(
    ("device", "minilm", "names", "encoder"),
    [
        ("cpu", "True", ("base", "sr"), "minilm"),
        ("cpu", "False", ("base", "sr"), "own"),
        ("gpu", "True", ("base_64", "sr_256"), "minilm"),
    ],
)
def test_sizes_follow_the_device_and_steps_the_captions(
    tools, tmp_path, device, minilm, names, encoder
):
    """A stand-in for `prepare` writes 100 captions."""
    answer = f"""[ "$1" != -c ] || {{ echo {device} {minilm}; exit; }}
echo "$@" >>{tmp_path}/calls
[ "$3" != prepare ] || seq 100 >{tmp_path}/run/prompts.jsonl"""
    path, run = tools(python=answer), tmp_path / "run"
    run.mkdir()
    for captions in (100, 7):  # The second start keeps the steps of the first.
        done = subprocess.run(
            ["bash", "launch/folder.sh", "images", run],
            cwd=ROOT,
            env={**os.environ, "PYTHON": str(path / "python")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        verbs = [call[2] for call in calls]
        assert ("pretrain_text" in verbs) == (encoder == "own")
        trained = {call[3].rpartition(":")[2]: call for call in calls if call[2] == "train"}
        assert set(trained) == set(names)
        base, sr = (trained[name] for name in names)
        assert "--config.train.steps=5800" in base and "--config.train.steps=2900" in sr
        path_of_text = "minilm" if encoder == "minilm" else f"{run}/text"
        assert f"--config.text.path={path_of_text}" in base
        assert ("minutes on two cores" in done.stdout) == (device == "cpu")
        (path / "python").write_text(f"#!/bin/bash\n{answer.replace('100', str(captions))}\n")
