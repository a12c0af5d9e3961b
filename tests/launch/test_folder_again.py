"""launch/folder.sh a second time: the text encoder stays, and changed data are allowed on request."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("flag", ["--allow_changes", "--allow-changes"])
def test_changes_are_allowed_in_training_alone(tools, tmp_path, flag):
    path = tools(python=f'echo "$@" >>{tmp_path}/calls')
    run = tmp_path / "my run"
    (run / "text").mkdir(parents=True)
    (run / "text" / "pretrain.json").write_text("{}")
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
    assert verbs == ["prepare", "embed", "train", "train", "export", "export"]
    for verb, line in zip(verbs, calls, strict=True):
        assert (words[0] in line) == (verb == "train"), line
        assert (words[1] in line) == (verb != "export"), line
