"""The benchmarks of docs/performance.md run to completion, at sizes too small to measure speed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

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
def test_the_gpu_script_survives_a_kill_without_a_gpu(tmp_path):
    """Every part runs at a small size; what had ended before the kill is not run again."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", f"--out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    first = subprocess.Popen(command, cwd=SOURCE, env=environment, start_new_session=True)
    try:
        while not out.exists():
            assert first.poll() is None
            time.sleep(0.1)
        time.sleep(1.0)  # The second part has begun.
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    kept = json.loads(out.read_text())
    found = run("gpu.py", "--tiny", f"--out={out}", "--seconds=3000")
    assert json.loads(out.read_text()).items() <= found.items()
    assert kept.items() <= found.items() and len(kept) == 1
    for name in ("base_64_500m", "base_64", "sr_256", "sr_1024"):
        for kind in ("train", "tuned"):
            (trained,) = (found[x] for x in found if x.startswith(f"{kind} {name} "))
            (row,) = trained["rows"]
            assert positive(row["seconds"]) and row["images_per_s"] > 0
            assert row["dtype"] == "bfloat16" and row["compile_s"] > 0 and row["peak_bytes"] > 0
            assert len(row["top"]) == 10 and 0 < row["top_share"] <= 1
    for name in ("base_64", "sr_256", "sr_1024"):
        assert positive(found[f"sample {name}"]["rows"][0]["seconds"]), name
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
def test_shapes_step_beside_another_checkout():
    """The same code on both sides: the ratio of two rounds is about one."""
    here = pathlib.Path(__file__).parents[2]
    flags = ("--repeats=2", "--only_steps", f"--against={here}", BATCH, *NETWORK)
    mean, low, high = run("shapes_step.py", *flags)["processor_speed"]
    assert low <= mean <= high
    assert mean == pytest.approx(1.0, abs=0.5)


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
