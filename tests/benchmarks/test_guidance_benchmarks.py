"""The benchmark commands of docs/sampling.md, on an untrained cascade."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.config.text import PretrainTextConfig, TextConfig
from imagen_jax.stages.folder import write_stage
from imagen_jax.worlds.shapes import scenes

SOURCE = pathlib.Path(__file__).parents[2]
PROMPTS = 6


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=SOURCE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cascade_flags(base_config, sr_config, random_params, write_world, tmp_path_factory):
    """--stages and --prompts of a tiny cascade 16 -> 64 with its text encoder."""
    folder = tmp_path_factory.mktemp("cascade")
    small = PretrainTextConfig(emb_dim=8, num_layers=1, num_heads=1, mlp_dim=8, steps=1)
    text = TextConfig(path=str(folder / "text"))
    sizes = {"base": (16, 0, base_config), "sr": (64, 16, sr_config)}
    for name, (size, lowres, config) in sizes.items():
        data = dataclasses.replace(config.data, image_size=size, lowres_size=lowres)
        sampling = dataclasses.replace(config.sampling, steps=2)
        config = dataclasses.replace(
            config, data=data, sampling=sampling, text=text, pretrain_text=small
        )
        write_stage(folder / name, random_params(config), config, {})
        if name == "base":
            world = write_world(folder, config, steps=1, every=1)
            flags = [f"--config={world}", f"--out={folder / 'text'}"]
            command("-m", "imagen_jax", "pretrain_text", *flags)
    rows = [scenes.prompt_row(scenes.scene("held_out", index)) for index in range(4 * PROMPTS)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    return [f"--stages={folder / 'base'},{folder / 'sr'}", f"--prompts={prompts}", "--count=6"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "points", "charts"),
    [
        ("thresholding", 30, ["thresholding_alignment", "thresholding_saturation"]),
        ("classifier_guidance", 18, ["classifier_guidance"]),
    ],
)
def test_a_figure_and_its_table(cascade_flags, tmp_path, name, points, charts):
    docs, out = tmp_path / "docs", tmp_path / "out"
    (docs / "images").mkdir(parents=True)
    page = f"before\n<!-- begin {name} -->\nstale\n<!-- end {name} -->\nafter\n"
    (docs / "sampling.md").write_text(page)
    steps = ["--steps=2"] if name == "classifier_guidance" else []
    command(f"benchmarks/{name}.py", *cascade_flags, *steps, f"--out={out}", f"--docs={docs}")
    record = json.loads((out / f"{name}.json").read_text())
    assert len(record["points"]) == points and record["prompts"] == PROMPTS
    table = (docs / "sampling.md").read_text()
    assert table.startswith("before\n") and table.endswith("after\n") and "stale" not in table
    assert table.count("\n| ") >= 10
    for chart in charts:
        assert "<use " in (docs / "images" / f"{chart}.svg").read_text()
