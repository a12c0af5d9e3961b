"""The demo's promise: prompts that were held out of training, drawn and read without a model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.data import shapes

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_demo_draws_what_held_out_prompts_ask_for(tmp_path: pathlib.Path):
    run = tmp_path / "demo"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", "launch/demo.sh", run], cwd=REPOSITORY, env=environment, check=True)

    assert (run / "grid.png").is_file()
    samples = [json.loads(line) for line in (run / "samples" / "samples.jsonl").open()]
    assert len(samples) > 300
    assert all((run / "samples" / row["file"]).is_file() for row in samples)
    trained = {shapes.scene("train", i).caption for i in range(shapes.SPLITS["train"])}
    assert not trained & {row["prompt"] for row in samples}

    kinds = json.loads((run / "alignment.json").read_text())["kinds"]
    assert kinds["single"]["scores"]["exact"]["mean"] >= 0.90
    assert kinds["count"]["scores"]["exact"]["mean"] >= 0.40
    assert kinds["relation"]["scores"]["order"]["n"] > 0
    for kind in ("single", "count", "relation"):
        assert kinds[kind]["ceiling"]["exact"]["mean"] >= 0.99
