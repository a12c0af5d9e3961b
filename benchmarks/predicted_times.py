"""Predicted times of ten programs on this CPU beside measured ones (docs/plan.md).

    taskset -c 0 python benchmarks/predicted_times.py --out=runs/predicted_times

The prediction is that of `imagen plan` on TPUs (planning/step_time.py), with the peaks of this
machine's core, each measured by a program that is none of the ten and the best of several runs:

- FLOP/s: a product of two matrices of 512;
- bytes/s: a sum of arrays of 16 MiB, more than a core's share of the caches;
- windows: a convolution to 4 channels, whose products take little, copies windows of 3x3 pixels;
- plain arithmetic: 8 multiplications and 8 additions of every element of an array;
- functions: two exp of every element, as many as a softmax or silu fused with another has at most;
- start: sums and products of 64 numbers, one after the other;
- call: programs with 1 and 401 arguments, and with as many results.

Times are seconds of the process, the least of several runs, so that other work on the machine
counts less. The programs were chosen before any was measured. The folder of --out holds each
program's text and time: a run that was stopped continues, the table is of all programs measured so
far, and --only=none measures the peaks once more, of which the best count.

Hardware: one CPU core. Time: about ten minutes.
"""

from __future__ import annotations

import argparse
import functools
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
from imagen_jax.parallel import instructions, partitioning, topology
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
MANY = 400
TEXT_DIM = 384  # of MiniLM


def least(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the process for a call, the least of several within two seconds or more."""
    call()
    found = []
    while len(found) < repeats or (sum(found) < 2.0 and len(found) < 20 * repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def measure_peaks(repeats: int) -> Peaks:
    """What this machine's core can do at most."""

    def seconds(call: Callable[..., Any], *arguments: Any) -> float:
        options = partitioning.forward_options()
        compiled = jax.jit(call, keep_unused=True).lower(*arguments).compile(options)
        return least(lambda: jax.block_until_ready(compiled(*arguments)), repeats)

    def growth(call: Callable[[int], float]) -> float:
        return (call(1 + MANY) - call(1)) / MANY

    matrix, array = jnp.ones((512, 512)), jnp.ones(1 << 22)
    flops = 2.0 * 512**3 / seconds(jnp.dot, matrix, matrix)
    values = array[: 1 << 16]
    plain = seconds(functools.partial(repeated, 8, lambda x: x * 1.0001 + 0.1), values)
    exps = seconds(functools.partial(repeated, 2, lambda x: jnp.exp(x) * 0.3), values)
    many = {count: {str(i): jnp.ones(4) for i in range(count)} for count in (1, 1 + MANY)}
    argument = growth(lambda count: seconds(lambda x: x["0"] + 1.0, many[count]))
    both = growth(lambda count: seconds(lambda x: jax.tree.map(jnp.negative, x), many[count]))
    start = measure_start(repeats)
    return Peaks(
        flops=flops,
        hbm=3 * array.nbytes / seconds(jnp.add, array, array),
        ici=1.0,
        dcn=1.0,
        plain=16 * values.size / plain,
        functions=2 * values.size / exps,
        windows=measure_windows(seconds, flops),
        start=start,
        argument=argument,
        result=both - argument - start,
    )


def measure_start(repeats: int) -> float:
    """Seconds that an operation takes to start: of sums and products of 8x8 numbers."""

    def call(x: jax.Array, count: int) -> jax.Array:
        return repeated(count, lambda x: jnp.sum(x, axis=0)[:, None] * x, x)

    few, found = jnp.ones((8, 8)), []
    for count in (1, 101):
        lowered = jax.jit(call, static_argnums=1).lower(few, count)
        compiled = lowered.compile(partitioning.forward_options())
        program = instructions.parse(compiled.as_text() or "")
        entry = program.computations[program.entry]
        operations = sum(one.opcode not in instructions.FREE for one in entry)
        found.append(
            (operations, least(lambda run=compiled: jax.block_until_ready(run(few)), repeats))
        )
    (of_one, one), (of_many, many) = found
    return (many - one) / (of_many - of_one)


def best(found: list[Peaks]) -> Peaks:
    """The best of several measurements of the same peaks."""
    least = ("start", "argument", "result")
    pick = {name: min if name in least else max for name in Peaks._fields}
    return Peaks(**{name: pick[name](getattr(one, name) for one in found) for name in pick})


def repeated(times: int, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A function of the result of itself, several times."""
    for _ in range(times):
        x = function(x)
    return x


def measure_windows(seconds: Callable[..., float], flops: float) -> float:
    """Elements/s of windows that a convolution copies, beside its products."""
    batch, side, channels, features = 8, 16, 128, 4
    dims = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims
    )
    image = jnp.ones((batch, side, side, channels))
    elements = batch * side**2 * 9 * channels
    whole = seconds(convolve, image, jnp.ones((3, 3, channels, features)))
    return elements / (whole - 2.0 * elements * features / flops)


def measure(spec: str, kind: str, batch: int, repeats: int) -> tuple[dict[str, Any], str]:
    """A program with its measured seconds, and its text."""
    changes = [f"data.batch_size={batch}", f"model.text_dim={TEXT_DIM}"]
    config = overrides.load(str(ROOT / "configs" / spec), changes)
    program, start = programs.STAGES[kind](config, topology.this_machine())
    options = None if kind == "train" else partitioning.forward_options()
    planned = plan.compile_program(program, topology.this_machine(), options)
    assert planned.compiled is not None
    found = {"config": spec, "program": kind, "batch": batch, "steps": config.sampling.steps}
    found["measured"] = least(start(planned.compiled), repeats)
    return found, planned.compiled.as_text() or ""


def report(folder: pathlib.Path) -> None:
    """Prints predicted times of all programs in a folder beside the measured ones."""
    taken = json.loads((folder / "peaks.json").read_text())
    peak = best([Peaks(**one) for one in taken])
    rows = []
    for number in range(len(CHOSEN)):
        if (folder / f"{number}.json").exists():
            row = json.loads((folder / f"{number}.json").read_text())
            text = (folder / f"{number}.hlo").read_text()
            predicted = step_time.predict(text, peak, unknown_trips=row["steps"])
            row |= {"predicted": predicted.seconds, "products": predicted.products}
            rows.append(row | {"ratio": row["measured"] / predicted.seconds})
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
    print(json.dumps({"benchmark": "predicted_times", **reporting.machine(), **peak._asdict()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="numbers, such as 0,3; none: peaks again")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags = parser.parse_args()
    set_up_devices(1)
    flags.out.mkdir(parents=True, exist_ok=True)
    file = flags.out / "peaks.json"
    taken = json.loads(file.read_text()) if file.exists() else []
    if not taken or flags.only == "none":
        taken.append(measure_peaks(flags.repeats)._asdict())
        file.write_text(json.dumps(taken, indent=1) + "\n")
    chosen = range(len(CHOSEN))
    if flags.only:
        chosen = [] if flags.only == "none" else [int(number) for number in flags.only.split(",")]
    for number in chosen:
        if not (flags.out / f"{number}.json").exists():
            found, text = measure(*CHOSEN[number], repeats=flags.repeats)
            print(found, flush=True)
            (flags.out / f"{number}.hlo").write_text(text)
            (flags.out / f"{number}.json").write_text(json.dumps(found) + "\n")
    report(flags.out)


if __name__ == "__main__":
    main()
