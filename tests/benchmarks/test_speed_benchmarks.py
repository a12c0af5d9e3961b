"""The benchmarks of docs/performance.md run to completion, at sizes too small to measure speed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.stages import folder as stage

SOURCE = pathlib.Path(__file__).parents[2]
NETWORK = ("--config.model.channels=(16,16)", "--config.mesh.cpu_devices=1")
BATCH = "--config.data.batch_size=2"


def run(script: str, *arguments: str) -> dict:
    """The last JSON line of a benchmark's output."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=SOURCE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines()[::-1] if x.startswith("{")))


def positive(seconds: dict[str, float]) -> bool:
    return 0 < seconds["min"] <= seconds["median"] <= seconds["max"]


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    found = run("gpu.py", "--tiny", f"--out={out}")
    assert json.loads(out.read_text()).items() <= found.items()
    trained = found["train 2"]["rows"][0]
    assert positive(trained["seconds"]) and trained["images_per_s"] > 0
    assert trained["top"] and 0 < trained["top_share"] <= 1
    for name in ("sample base", "sample sr"):
        assert positive(found[name]["rows"][0]["seconds"]), name
    assert "rows" in found["peers"] or "torch" in found["peers"]["skipped"]


@pytest.mark.slow
def test_shapes_step(tmp_path):
    found = run("shapes_step.py", "--repeats=1", BATCH, *NETWORK)
    kinds = {row["kind"]: row for row in found["convolutions"]}
    assert set(kinds) == {"forward", "gradient of input", "gradient of kernel"}
    # Every kernel has a gradient; the input of the first convolution has none.
    assert kinds["forward"]["count"] == kinds["gradient of kernel"]["count"]
    assert kinds["forward"]["count"] == kinds["gradient of input"]["count"] + 1
    assert positive(found["step"]["seconds"]) and found["fraction"] > 0
    assert sum(found["profile"].values()) == pytest.approx(1.0, abs=0.3)


@pytest.mark.slow
def test_programs_and_checkpoints():
    found = run(
        "programs.py",
        "--config=configs/shapes.py:base",
        "--repeats=1",
        BATCH,
        *NETWORK,
        "--config.sampling.steps=2",
    )
    forward, train, sample = found["rows"]
    # The gradient costs two forward passes; the compiler also counts elementwise operations.
    assert train["flops"] == pytest.approx(3 * forward["flops"], rel=0.15)
    # Two guided steps, each of them the network on a batch of 2B.
    assert sample["flops"] == pytest.approx(4 * forward["flops"], rel=0.05)
    assert train["compiler_flops"] > 0.9 * train["flops"]
    found = run("checkpoints.py", "--repeats=1", *NETWORK)
    assert positive(found["save_until_written"]) and positive(found["restore"])


@pytest.mark.slow
def test_sampling_beside_another_checkout(base_config, random_params, tmp_path):
    stage.write_stage(tmp_path / "base", random_params(base_config), base_config, {})
    flags = [f"--before={SOURCE}", f"--stages={tmp_path / 'base'}", "--batches=1,3", "--repeats=3"]
    found = run("sample_speed.py", *flags)
    for batch in (1, 3):
        row = found[f"batch_{batch}"]
        assert row["rounds"] == 3 and 0 < row["low"] <= row["ratio"] <= row["high"]
