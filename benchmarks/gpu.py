"""Benchmarks of training and sampling on one GPU, within ten minutes.

    python benchmarks/gpu.py [--out=gpu.json] [--seconds=600] [--parts=...] [--tiny]

Runs the other benchmarks in order of importance, each in its own process with a time limit:

- train: base_64 of the paper at the batch size of one GPU, in bfloat16 with Adafactor and float32
  averages: the train step and its most expensive operations.
- peers: the U-Net of DeepFloyd IF's architecture, here and in diffusers (torch eager and compiled).
  Skipped without torch or diffusers.
- sample: a few steps of the sampler of each of the three stages.

`--tiny` runs the same commands on the stages of the shapes world, as a test on any machine. A part
that fails or times out is reported, and the next one runs. Prints one table and one JSON line,
which is also written to `--out`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import reporting

HERE = pathlib.Path(__file__).parent
IMAGEN = "configs/imagen.py"


class Part(NamedTuple):
    """A benchmark to run: script and flags, time limit in seconds, required modules."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    memory: float = 0.92  # Fraction of GPU memory for JAX; torch needs a part of it in `peers`.


# The second batch size is tried if the first fails. Text embeddings are random.
TRAIN_BATCHES = (32, 16)
SAMPLED = {"base_64": 32, "sr_256": 8, "sr_1024": 1}  # Stage -> batch size.
SAMPLE_STEPS = 8


def parts_of(tiny: bool) -> list[Part]:
    """The benchmarks to run, the most important first."""
    if tiny:
        small = ("--batch=2", "--repeats=1", "--config.mesh.cpu_devices=1")
        base = ("programs.py", "--config=configs/shapes.py:base", *small)
        base = (*base, "--config.model.channels=(16,32)")
        sr = ("programs.py", "--config=configs/shapes.py:sr", *small)
        steps = ("--stages=sample", "--config.sampling.steps=2")
        peers = ("--size=tiny", "--batches=1", "--repeats=1", "--without=compiled,lucidrains")
        return [
            Part("train 2", (*base, "--stages=train", "--trace"), 200),
            Part("peers", ("side_by_side.py", *peers), 200, ("torch", "diffusers")),
            Part("sample base", (*base, *steps), 200),
            Part("sample sr", (*sr, *steps), 200),
        ]
    base = f"--config={IMAGEN}:base_64"
    trains = [
        Part(f"train {n}", ("programs.py", base, "--stages=train", f"--batch={n}", "--trace"), 240)
        for n in TRAIN_BATCHES
    ]
    peers = ("side_by_side.py", "--size=if_m", "--dtype=bfloat16", "--batches=8")
    samples = [
        Part(
            f"sample {name}",
            ("programs.py", f"--config={IMAGEN}:{name}", "--stages=sample", f"--batch={batch}")
            + (f"--config.sampling.steps={SAMPLE_STEPS}",),
            90,
        )
        for name, batch in SAMPLED.items()
    ]
    side = Part("peers", (*peers, "--without=lucidrains"), 300, ("torch", "diffusers"), 0.4)
    return [*trains, side, *samples]


def run(part: Part, left: float) -> dict[str, Any]:
    """The JSON line of a part, or the reason why it has none."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"needs {', '.join(missing)}"}
    if left < 30:
        return {"skipped": "no time left"}
    script, *rest = part.command
    command = [sys.executable, str(HERE / script), *rest]
    limit = min(part.seconds, left)
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(part.memory)} | os.environ
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=HERE.parent, env=env
        )
    except subprocess.TimeoutExpired as cut:
        output = (cut.stdout or b"").decode().strip().splitlines()
        return {"failed": f"took more than {limit:.0f} s: {output[-1] if output else 'no output'}"}
    took = round(time.perf_counter() - begin, 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        why = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return {"failed": why[:500], "took_s": took}
    return json.loads(lines[-1]) | {"took_s": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parts", default="", help="prefixes of part names, A,B,...; empty: all")
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    begin, found = time.perf_counter(), {}
    trained = False
    for part in parts_of(flags.tiny):
        training = part.name.startswith("train")
        selected = not flags.parts or part.name.startswith(tuple(flags.parts.split(",")))
        if not selected or (training and trained):
            continue
        print(f"# {part.name}: {' '.join(part.command)}", flush=True)
        found[part.name] = run(part, flags.seconds - (time.perf_counter() - begin))
        trained |= training and "rows" in found[part.name]
        pathlib.Path(flags.out).write_text(json.dumps(found, indent=1) + "\n")
    cells = []
    for name, result in found.items():
        for row in result.get("rows", ()):
            what = row.get("program") or f"{row['what']} {row['who']} {row['way']}"
            speed = (row["images_per_s"], row["tflops_per_s"], row.get("mfu", "-"))
            cells.append((name, what, row["batch"], row["seconds"]["median"], *speed))
        if "rows" not in result:
            cells.append((name, result.get("failed") or result.get("skipped"), *["-"] * 5))
    titles = ("part", "what", "batch", "s", "images/s", "TFLOP/s", "MFU")
    print(reporting.table(titles, cells))
    print(json.dumps({"benchmark": "gpu", **found}))


if __name__ == "__main__":
    main()
