"""The demo: held-out prompts are sampled and scored without a learned model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.worlds.shapes import scenes

REPOSITORY = pathlib.Path(__file__).parents[2]


def _launch(script: str, run: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", f"launch/{script}", run], cwd=REPOSITORY, env=environment, check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    _launch("demo.sh", folder)
    return folder


@pytest.mark.slow
def test_demo_samples_match_held_out_prompts(run: pathlib.Path):
    assert (run / "grid.png").is_file()
    samples = [json.loads(line) for line in (run / "samples" / "samples.jsonl").open()]
    assert len(samples) > 300
    assert all((run / "samples" / row["file"]).is_file() for row in samples)
    trained = {scenes.scene("train", i).caption for i in range(scenes.SPLITS["train"])}
    assert not trained & {row["prompt"] for row in samples}

    kinds = json.loads((run / "alignment.json").read_text())["kinds"]
    assert kinds["single"]["scores"]["exact"]["mean"] >= 0.90
    assert kinds["count"]["scores"]["exact"]["mean"] >= 0.40
    assert kinds["relation"]["scores"]["order"]["n"] > 0
    for kind in ("single", "count", "relation"):
        assert kinds[kind]["ceiling"]["exact"]["mean"] >= 0.99


def test_the_third_stage_needs_the_first_two(tmp_path: pathlib.Path):
    command = ["bash", "launch/demo_256.sh", tmp_path]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr == f"{tmp_path} has no samples; run launch/demo.sh {tmp_path} first\n"


@pytest.mark.slow
def test_the_third_stage_keeps_content_and_sharpens_edges(run: pathlib.Path):
    _launch("demo_256.sh", run)

    assert (run / "grid_256.png").is_file()
    edges = json.loads((run / "edges.json").read_text())
    assert edges["sharper"] >= 0.99
    assert edges["sharpness"]["drawn"] > 2 * edges["sharpness"]["bicubic"]
    for by_name in edges["seams"].values():
        assert 0.98 <= by_name["drawn"]["flat"]["mean"] <= 1.02
    small, large = (
        json.loads((run / name).read_text())["kinds"]["all"]["scores"]["exact"]
        for name in ("alignment.json", "alignment_256.json")
    )
    assert large["mean"] >= small["low"]
