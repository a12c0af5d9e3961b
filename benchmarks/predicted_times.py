"""Predicted times of ten programs on this CPU beside measured ones (docs/plan.md).

    taskset -c 0 python benchmarks/predicted_times.py --out=runs/predicted_times.json

The prediction is that of `imagen plan` on TPUs (planning/step_time.py), with this machine's peaks:
FLOP/s of a convolution, of 3x3 pixels and 128 channels, and bytes/s of a sum of two arrays that
together fill half of a core's share of the caches. Both are the best of several runs. Times are
seconds of the process, the least of several runs, so that other work on the machine counts less.
The programs were chosen before any was measured.

Hardware: one CPU core. Time: about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import reporting

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.parallel import partitioning, topology
from imagen_jax.parallel.peaks import Peaks
from imagen_jax.planning import plan, step_time

ROOT = pathlib.Path(__file__).parents[1]
# Configuration, kind of program, batch.
CHOSEN = (
    ("shapes.py:base", "forward", 1),
    ("shapes.py:base", "forward", 32),
    ("shapes.py:base", "train", 16),
    ("shapes.py:sr", "forward", 8),
    ("shapes.py:sr", "train", 8),
    ("shapes.py:sr", "sample", 4),
    ("emoji.py:base", "forward", 8),
    ("emoji.py:base", "train", 16),
    ("emoji.py:base", "sample", 8),
    ("emoji.py:sr", "train", 4),
)
FACTOR = 1.5
TEXT_DIM = 384  # of MiniLM


def least(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the process for a call, the least of several."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def measure_peaks(repeats: int) -> Peaks:
    """FLOP/s and bytes/s of this machine's core."""
    channels, side, batch = 128, 16, 8
    image = jnp.ones((batch, side, side, channels))
    kernel = jnp.ones((3, 3, channels, channels))
    dims = ("NHWC", "HWIO", "NHWC")
    convolve = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims),
        compiler_options=partitioning.forward_options(),
    )
    taps = (3 * side - 2) ** 2  # Those on padding do not count.
    work = 2.0 * batch * taps * channels * channels
    rate = work / least(lambda: jax.block_until_ready(convolve(image, kernel)), repeats)
    a = jnp.ones(1 << 20)
    add = jax.jit(lambda a, b: a + b)
    moved = 3 * a.nbytes / least(lambda: jax.block_until_ready(add(a, a)), repeats)
    return Peaks(flops=rate, hbm=moved, ici=1.0, dcn=1.0)


def row(spec: str, kind: str, batch: int, peak: Peaks, repeats: int) -> dict[str, Any]:
    """Predicted and measured seconds of a program."""
    changes = [f"data.batch_size={batch}", f"model.text_dim={TEXT_DIM}"]
    config = overrides.load(str(ROOT / "configs" / spec), changes)
    program, start = programs.STAGES[kind](config, topology.this_machine())
    options = None if kind == "train" else partitioning.forward_options()
    planned = plan.compile_program(program, topology.this_machine(), options)
    assert planned.compiled is not None
    text = planned.compiled.as_text() or ""
    predicted = step_time.predict(text, peak, unknown_trips=config.sampling.steps)
    seconds = least(start(planned.compiled), repeats)
    found = {"config": spec, "program": kind, "batch": batch, "predicted": predicted.seconds}
    found |= {"products": predicted.products, "measured": seconds}
    return found | {"ratio": seconds / predicted.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="numbers of rows, such as 0,3")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    flags = parser.parse_args()
    set_up_devices(1)
    peak = measure_peaks(4 * flags.repeats)
    print(f"{peak.flops / 1e9:.1f} GFLOP/s, {peak.hbm / 1e9:.1f} GB/s", flush=True)
    chosen = [int(n) for n in flags.only.split(",")] if flags.only else range(len(CHOSEN))
    rows = []
    for number in chosen:
        rows.append(row(*CHOSEN[number], peak=peak, repeats=flags.repeats))
        print(rows[-1], flush=True)
    titles = ("program", "batch", "predicted, s", "products", "measured, s", "measured / predicted")
    lines = [
        (f"{r['config']} {r['program']}", r["batch"], r["predicted"])
        + (f"{r['products'] / r['predicted']:.0%}", r["measured"], r["ratio"])
        for r in rows
    ]
    print(reporting.table(titles, lines))
    within = sum(1 / FACTOR <= r["ratio"] <= FACTOR for r in rows)
    print(f"{within} of {len(rows)} within a factor of {FACTOR}; median ratio", end=" ")
    print(f"{np.median([r['ratio'] for r in rows]):.3g}")
    found = {"benchmark": "predicted_times", **reporting.machine(), "peaks": peak._asdict()}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
