"""The verbs that look into a run, one after the other as a person would type them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

SOURCE = pathlib.Path(__file__).parents[2]


def imagen(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "imagen_jax", *arguments],
        cwd=SOURCE,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_diverging_run_stops_and_its_fault_replays(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=30, every=5)
    run = tmp_path / "run"
    flags = (f"--config={config}", f"--workdir={run}", "--config.optimizer.learning_rate=1e30")
    ended = imagen("train", *flags)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1 and "steps in a row were not finite" in ended.stderr
    assert "going on from step" in ended.stdout, "there was no roll-back"
    first = min(int(path.stem) for path in (run / "faults").glob("*.json"))
    assert f"step {first}: " in ended.stdout

    replayed = imagen("replay", f"--workdir={run}", f"--step={first}")
    assert replayed.returncode == 0, replayed.stderr
    assert "\nreproduced: " in replayed.stdout
    unknown = imagen("replay", f"--workdir={run}", "--step=99999")
    assert unknown.returncode == 1 and "no such fault" in unknown.stderr


@pytest.mark.slow
def test_from_captions_to_contact_sheets(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=4, every=4)
    text, run, stage, out = (tmp_path / name for name in ("text", "run", "stage", "out"))
    flags = [f"--config={config}", f"--config.text.path={text}", "--config.pretrain_text.steps=3"]
    flags += [f"--config.data.embeddings={tmp_path / 'own'}", "--config.data.max_text_len=8"]
    for command in (
        ["pretrain_text", *flags, f"--out={text}"],
        ["embed", *flags],
        ["train", *flags, f"--workdir={run}", "--config.train.sample_every=2"],
        ["export", f"--workdir={run}", f"--out={stage}"],
        ["diagnose", *flags, f"--stages={stage}", f"--out={out}"],
    ):
        done = imagen(*command)
        assert done.returncode == 0, done.stderr
    assert list((run / "tensorboard").glob("events*"))
    grids = [Image.open(run / "samples" / f"step_0000000{step}.png") for step in (2, 4)]
    assert grids[0].size == grids[1].size and grids[0].height >= 3 * 64
    assert grids[0].tobytes() != grids[1].tobytes()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3, 4]
    with Image.open(out / "base.png") as sheet:
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 64, "the sheet is blank"
