"""Benchmarks of training and sampling on one GPU, within ten minutes.

    python benchmarks/gpu.py [--out=gpu.json] [--seconds=600] [--parts=PREFIX,...] [--tiny]

Each part is a process of at most 90 s. Its result is in `--out` as soon as it ends, or what it had
measured when its time was over; the same command again runs what is missing. In this order:

- train: the four models that NVIDIA published figures of, for its own JAX Imagen on A100 GPUs, in
  bfloat16 with random images and embeddings: the train step, its memory, the time that compilation
  takes and its most expensive operations. Kernels are not tuned (`xla_gpu_autotune_level=0`):
  tuning those of base_64 took more than 205 s.
- sample: a few steps of the sampler of each of the three stages.
- peers: the U-Net of DeepFloyd IF's architecture, here and in diffusers (torch eager and compiled).
  Skipped without torch or diffusers.
- tuned: the train steps with tuned kernels. The choices made so far are kept beside `--out`, so the
  same command again gets further.

`--tiny` runs the same commands on narrow networks, as a test on any machine. A part that fails is
reported, and the next one runs. Prints one table and one JSON line.
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
from collections.abc import Mapping
from typing import Any, NamedTuple

import reporting

from imagen_jax.io import atomic
from imagen_jax.parallel import xla_flags

HERE = pathlib.Path(__file__).parent
SECONDS = 90
UNTUNED = "--xla_gpu_autotune_level=0"


class Model(NamedTuple):
    """A model to train, with the published speed of one A100 and the goal on one H200.

    Attributes:
      config: name in configs/imagen.py.
      batches: the first that runs is the result.
      published: NVIDIA JAX-Toolbox, rosetta, Imagen: A100-80G, 8 GPUs, bfloat16.
      goal: images/s of one H200 at the MFU of `published`.
    """

    config: str
    batches: tuple[int, ...]
    published: float
    goal: float


MODELS = (
    Model("base_64_500m", (128, 64, 32), 107, 340),
    Model("base_64", (64, 32, 16), 27.4, 87),
    Model("sr_256", (64, 32, 16), 84.3, 267),
    Model("sr_1024", (64, 32, 16), 84.8, 267),
)
SAMPLED = {"base_64": 32, "sr_256": 8, "sr_1024": 1}  # Stage -> batch size.
SAMPLE_STEPS = 8
# Two levels of little width: every kind of layer of the stage stays.
TINY = {
    "base": ("model.channels=(16,32)", "model.num_res_blocks=(1,1)", "model.head_dim=16")
    + ("model.self_attention=(False,True)", "model.cross_attention=(False,True)")
    + ("data.image_size=16",),
    "sr": ("model.channels=(16,32)", "model.num_res_blocks=(1,1)", "model.head_dim=16")
    + ("model.self_attention=(False,False)", "model.cross_attention=(False,True)")
    + ("model.strided_stem=(False,True)", "data.image_size=32", "data.lowres_size=16"),
    "all": ("model.embed_dim=0", "model.text_dim=32", "mesh.cpu_devices=1", "model.num_groups=8"),
}


class Part(NamedTuple):
    """A benchmark to run.

    Attributes:
      name: model and batch size, after the kind of the part.
      command: script and flags.
      needs: modules without which it is skipped.
      memory: fraction of the GPU's memory for JAX; torch needs a part of it in `peers`.
      flags: XLA_FLAGS.
      instead: parts with this prefix are alternatives; one result is enough.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    memory: float = 0.92
    flags: str = UNTUNED
    instead: str = ""


def programs(name: str, kind: str, *, batch: int, tiny: bool) -> tuple[str, ...]:
    """The command that measures a program of a stage of configs/imagen.py."""
    command = ("programs.py", f"--config=configs/imagen.py:{name}", f"--stages={kind}")
    if not tiny:
        return (*command, f"--batch={batch}")
    changes = (*TINY["all"], *TINY["base" if name.startswith("base") else "sr"])
    if name == "sr_1024":
        changes = (*changes, "data.crop_from=64", "model.cross_attention=(False,False)")
    return (*command, "--batch=2", "--repeats=1", *(f"--config.{change}" for change in changes))


def parts_of(out: pathlib.Path, tiny: bool) -> list[Part]:
    """The benchmarks to run, the most important first."""
    kept = f"--xla_gpu_per_fusion_autotune_cache_dir={out.absolute()}.tuned"
    kept += " --xla_gpu_experimental_autotune_cache_mode=AUTOTUNE_CACHE_MODE_UPDATE"
    trains, tuned = [], []
    for model in MODELS:
        for batch in model.batches[:1] if tiny else model.batches:
            command = (*programs(model.config, "train", batch=batch, tiny=tiny), "--trace")
            first, second = f"train {model.config} ", f"tuned {model.config} "
            trains.append(Part(first + str(batch), command, instead=first))
            tuned.append(Part(second + str(batch), command, flags=kept, instead=second))
    samples = [
        Part(
            f"sample {name}",
            programs(name, "sample", batch=batch, tiny=tiny)
            + (f"--config.sampling.steps={2 if tiny else SAMPLE_STEPS}",),
        )
        for name, batch in SAMPLED.items()
    ]
    peers = ("side_by_side.py", "--size=if_m", "--dtype=bfloat16", "--batches=8")
    peers += ("--without=lucidrains",)
    if tiny:
        peers = ("side_by_side.py", "--size=tiny", "--batches=1", "--repeats=1")
        peers += ("--without=compiled,lucidrains",)
    return [*trains, *samples, Part("peers", peers, ("torch", "diffusers"), 0.4), *tuned]


def last_result(output: str) -> dict[str, Any] | None:
    """The last JSON line; the process may have been killed while it wrote one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def run(part: Part, left: float) -> dict[str, Any]:
    """What a part has measured, and the reason if that is not all."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"needs {', '.join(missing)}"}
    if left < SECONDS / 3:
        return {"skipped": "no time left"}
    script, *rest = part.command
    limit = min(SECONDS, left)
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(part.memory)} | os.environ
    xla_flags.apply(env)
    env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.flags}".strip()
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / script), *rest],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=HERE.parent,
            env=env,
        )
        output, errors, failed = done.stdout, done.stderr.strip(), bool(done.returncode)
        why = (errors or output.strip() or "no output").splitlines()[-1][:500]
    except subprocess.TimeoutExpired as cut:
        output, failed = (cut.stdout or b"").decode(errors="replace"), True
        steps = [line for line in output.splitlines() if line.startswith("#")]
        why = f"took more than {limit:.0f} s{': ' if steps else ''}{''.join(steps[-1:])}"
    found = last_result(output) or {}
    if failed or not found.get("rows"):
        found |= {"complete": False, "failed": why}
    return found | {"took_s": round(time.perf_counter() - begin, 1)}


def is_complete(result: Mapping[str, Any] | None) -> bool:
    """Whether a part has measured everything."""
    return bool(result and result.get("rows") and result.get("complete", True))


def report(found: Mapping[str, Any]) -> str:
    """The table of all parts."""
    references = {m.config: (m.published, m.goal) for m in MODELS}
    cells = []
    for name, result in found.items():
        published, goal = "-", "-"
        if name.startswith(("train", "tuned")):
            published, goal = references[name.split()[1]]
        for row in result.get("rows", ()):
            what = row.get("program") or f"{row['what']} {row['who']} {row['way']}"
            seconds = row.get("seconds", {}).get("median", "-")
            speed = [row.get(key, "-") for key in ("images_per_s", "tflops_per_s", "mfu")]
            peak = row.get("peak_bytes_in_use", row.get("peak_bytes"))
            memory = (peak / 2**30 if peak else "-", row.get("compile_s", "-"))
            cells.append((name, what, row["batch"], seconds, *speed, published, goal, *memory))
        if "rows" not in result:
            why = result.get("failed") or result.get("skipped")
            cells.append((name, why, *["-"] * 5, published, goal, "-", "-"))
    titles = ("part", "what", "batch", "s", "images/s", "TFLOP/s", "MFU")
    titles += ("A100, published", "goal on H200", "GiB", "compile s")
    return reporting.table(titles, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu.json", help="also what an earlier run has measured")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parts", default="", help="prefixes of part names, A,B,...; empty: all")
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    out, begin = pathlib.Path(flags.out), time.perf_counter()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in parts_of(out, flags.tiny):
        selected = not flags.parts or part.name.startswith(tuple(flags.parts.split(",")))
        alternatives = [
            name for name in found if part.instead and name.startswith(part.instead)
        ] or [part.name]
        if not selected or any(is_complete(found.get(name)) for name in alternatives):
            continue
        print(f"# {part.name}: {' '.join(part.command)}", flush=True)
        found[part.name] = run(part, flags.seconds - (time.perf_counter() - begin))
        atomic.write_json(out, found)
    print(report(found))
    print(json.dumps({"benchmark": "gpu", **found}))


if __name__ == "__main__":
    main()
