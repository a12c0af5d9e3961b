"""Speed of the same U-Net here and in diffusers, and of a similar one in imagen-pytorch.

    python benchmarks/side_by_side.py [--size=small] [--batches=1,8] [--dtype=float32] [--repeats=5]

Needs the extra `peers`. diffusers' `UNet2DConditionModel` in DeepFloyd IF's architecture has random
weights, which are imported here like those of IF; outputs and losses are compared before timing.
Then the forward pass and a train step (mean squared error, gradient, Adam; no recomputation) are
timed in turn, in several rounds. torch runs eagerly and compiled, channels_last, with the number of
threads that is fastest in a short trial; JAX runs on one multi-threaded device. imagen-pytorch's
U-Net has other layers; its width is chosen to give a similar number of parameters. In bfloat16 the
train steps keep float32 parameters (torch: autocast) and the forward passes use a bfloat16 copy.

Prints a table and one JSON line: seconds per call (median, lowest and highest) and the ratio of
torch's time to JAX's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import operations
import reporting
import side_by_side_ours as ours
import side_by_side_torch as theirs

from imagen_jax.interop import if_unet


class Size(NamedTuple):
    """Architecture of the U-Net: image size and fields of diffusers' configuration."""

    side: int
    channels: tuple[int, ...]
    blocks: int
    head_dim: int
    text_dim: int
    pooling_heads: int


TEXT_LENGTH = 32
SIZES = {
    "tiny": Size(8, (32, 64), 1, 16, 24, 4),
    "small": Size(32, (64, 128, 192), 2, 32, 128, 4),
    "if_m": Size(64, (192, 384, 576, 768), 3, 64, 4096, 64),
}
# Tolerances: difference of outputs relative to their standard deviation, and of losses, relative.
TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (0.15, 0.02)}


def inputs_of(size: Size, batch: int) -> dict[str, np.ndarray]:
    """Random noisy images z [B, H, W, 3], steps, text [B, L, D] and targets."""
    rng = np.random.default_rng(batch)
    image_shape = (batch, size.side, size.side, 3)
    return {
        "z": rng.normal(size=image_shape).astype(np.float32),
        "step": rng.integers(0, 1000, batch),
        "text": rng.normal(size=(batch, TEXT_LENGTH, size.text_dim)).astype(np.float32),
        "target": rng.normal(size=image_shape).astype(np.float32),
    }


def check_equal(size: Size, batch: int, dtype: str, network: Any, model: Any) -> dict[str, float]:
    """Compares outputs and losses of both networks. Raises SystemExit if they differ."""
    inputs = inputs_of(size, batch)
    expected, expected_loss = theirs.output_and_loss(network, inputs, dtype)
    found, loss = ours.output_and_loss(model, inputs, dtype)
    errors = {
        "output": float(np.abs(found - expected).max() / expected.std()),
        "loss": abs(loss / expected_loss - 1.0),
    }
    for (name, error), limit in zip(errors.items(), TOLERANCE[dtype], strict=True):
        if not error <= limit:
            raise SystemExit(
                f"{name} differs by {error:.2g}, more than {limit}: the networks are not the same"
            )
    return errors


def fastest(candidates: dict[str, Any], trials: int = 2) -> str:
    """Name of the fastest call in a short trial."""
    found = reporting.interleaved(candidates, trials, seconds=0.0)
    return min(found, key=lambda name: min(found[name]))


def contest(
    what: str, contenders: dict[str, dict[str, Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each library's fastest way to run `what`, and the name of that way."""
    chosen = {name: fastest(ways) for name, ways in contenders.items()}
    calls = {name: contenders[name][way] for name, way in chosen.items()}
    print(f"# {what}: {chosen}", flush=True)
    return reporting.interleaved(calls, repeats), chosen


def rows_of(
    what: str,
    batch: int,
    times: dict[str, list[float]],
    chosen: dict[str, str],
    flops: float,
) -> list[dict[str, Any]]:
    """A row per library; `times_ours` is the median over rounds of its time divided by ours."""
    rows = []
    for name, seconds in times.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, times["ours"], strict=True)]
        counted = flops if name != "lucidrains" else 0.0  # Other layers, other FLOPs.
        row = {"what": what, "batch": batch, "who": name, "way": chosen[name]}
        row |= reporting.speed(seconds, images=batch, flops=counted)
        rows.append(row | {"times_ours": round(statistics.median(ratios), 3)})
    return rows


def print_profile(call: Callable[[], Any], program: str) -> None:
    """Prints the most expensive kinds of operation of a call, seconds over all threads."""
    call()
    spent = operations.seconds_by_kind(operations.seconds_by_operation(call, 3), program)
    total = sum(spent.values())
    rows = [(kind, s, f"{s / total:.1%}") for kind, s in list(spent.items())[:12]]
    print(reporting.table(("operation", "s", "share"), [*rows, ("all", total, "100%")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", default="", help="to skip, of: compiled,lucidrains")
    parser.add_argument("--what", default="forward,train")
    parser.add_argument("--threads", default="", help="of torch on CPUs; empty: 1 and all cores")
    parser.add_argument("--profile", action="store_true", help="of our most expensive operations")
    flags = parser.parse_args()
    size, without = SIZES[flags.size], flags.without.split(",")
    cores = len(os.sched_getaffinity(0))
    threads = [int(n) for n in flags.threads.split(",") if n] or sorted({1, cores})
    jax.config.update("jax_num_cpu_devices", 1)

    network = theirs.diffusers_network(size)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        model = if_unet.load(folder)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model[1]))
    lucid = None
    if "lucidrains" not in without:
        lucid = theirs.lucidrains_network(size, parameters)
    rows, errors = [], {}
    for batch in map(int, flags.batches.split(",")):
        inputs = inputs_of(size, batch)
        errors[batch] = check_equal(size, batch, flags.dtype, network, model)
        for what in flags.what.split(","):
            run = ours.Runner(what, model, inputs, flags.dtype)
            call = run.call()
            if flags.profile:
                print_profile(call, run.program)
            contenders = {"ours": {"one device": call}}
            contenders["eager"] = theirs.ways(what, network, inputs, flags.dtype, threads, "eager")
            if "compiled" not in without:
                ways = theirs.ways(what, network, inputs, flags.dtype, threads, "compiled")
                contenders["compiled"] = ways
            if lucid is not None:
                ways = theirs.ways(what, lucid, inputs, flags.dtype, threads, "eager")
                contenders["lucidrains"] = ways
            times, chosen = contest(f"{what}, batch {batch}", contenders, flags.repeats)
            rows += [
                row | run.cost for row in rows_of(what, batch, times, chosen, run.cost["flops"])
            ]
    titles = ("what", "batch", "who", "way", "s", "min", "max", "images/s", "TFLOP/s", "x ours")
    print(
        reporting.table(
            titles,
            [
                (r["what"], r["batch"], r["who"], r["way"], *r["seconds"].values())
                + (r["images_per_s"], r["tflops_per_s"], r["times_ours"])
                for r in rows
            ],
        )
    )
    result = {"benchmark": "side_by_side", "size": flags.size, "dtype": flags.dtype}
    result |= reporting.machine() | {"torch": theirs.versions(), "params": parameters}
    if lucid is not None:
        result["lucidrains_params"] = theirs.parameters(lucid)
    print(json.dumps(result | {"differences": errors, "rows": rows}))


if __name__ == "__main__":
    begin = time.perf_counter()
    main()
    print(f"# {time.perf_counter() - begin:.0f} s")
