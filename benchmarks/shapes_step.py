"""Time of a train step, of its convolutions alone, and of its most expensive operations.

    python benchmarks/shapes_step.py [--config=configs/shapes.py:base] [--repeats=5] [--against=DIR]

The step is compiled as in `train`, for the devices of the configuration. Each of its convolutions
(forward, gradient of the input, gradient of the kernel) is compiled alone, at its shape per device,
and runs on all devices at once; their sum is a lower bound of the step. The profile gives seconds
by kind of operation over all devices, including the profiler's overhead. `--against` is the folder
of a checkout of another version, whose steps are timed in turn with these, in separate processes,
--repeats rounds of ten; the speed ratio has a 95% interval over the rounds (at least two).
Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import operations
import reporting
import sample_speed
import train_loop
from jax.extend import core

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.parallel import flops, partitioning
from imagen_jax.planning import plan
from imagen_jax.stages.loss import loss_given_randomness, sample_randomness
from imagen_jax.stages.network import init_params
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.step import jit_train_step

SECONDS_PER_REPEAT = 3.0  # Minimum duration of the consecutive steps of one repeat.
STEPS = 10  # Of a round beside another version.


def convolutions(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The convolutions of a jaxpr without loops, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for value in eqn.params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            if isinstance(inner, core.Jaxpr):
                yield from convolutions(inner)


def seconds_alone(run: Callable[..., Any], arrays: list[Any], devices: int) -> float:
    """Seconds of `run(*arrays)` on all devices at once, with the compiler options of the step."""
    mesh = jax.make_mesh((devices,), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    stacked = [np.stack([array] * devices) for array in arrays]
    sharded = jax.device_put(stacked, jax.sharding.NamedSharding(mesh, rows))
    one = lambda *parts: run(*(part[0] for part in parts))[None]  # noqa: E731
    specs = (rows,) * len(arrays)
    mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=rows)
    compiled = jax.jit(mapped).lower(*sharded).compile(partitioning.train_step_options())
    calls = {"alone": lambda: jax.block_until_ready(compiled(*sharded))}
    return min(reporting.interleaved(calls, repeats=5, seconds=0.02)["alone"])


def parts_of(eqn: core.JaxprEqn) -> dict[str, Callable[..., Any]]:
    """Name -> function of (input, kernel, output gradient) of the three convolutions of a step."""
    params = eqn.params

    def conv(x: Any, kernel: Any) -> Any:
        layout = {"dimension_numbers": params["dimension_numbers"]}
        return jax.lax.conv_general_dilated(
            x, kernel, params["window_strides"], params["padding"], **layout
        )

    return {
        "forward": lambda x, k, g: conv(x, k),
        "gradient of input": lambda x, k, g: jax.vjp(lambda x: conv(x, k), x)[1](g)[0],
        "gradient of kernel": lambda x, k, g: jax.vjp(lambda k: conv(x, k), k)[1](g)[0],
    }


def convolution_rows(config: Config, devices: int) -> list[dict[str, Any]]:
    """Count, FLOPs and seconds of the step's convolutions, per device."""
    rows = config.data.batch_size // devices
    data = dataclasses.replace(config.data, batch_size=rows)
    batch = plan.batch_shapes(dataclasses.replace(config, data=data))

    def loss(params: Any, batch: Any) -> Any:
        examples = {**batch, **sample_randomness(jax.random.key(0), rows, config)}
        return loss_given_randomness(params, examples, jax.random.key(1), config)

    params = jax.eval_shape(lambda: partitioning.unbox(init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, float] = {}
    for index, eqn in enumerate(convolutions(jax.make_jaxpr(loss)(params, batch).jaxpr)):
        arrays = [
            rng.normal(size=v.aval.shape).astype(np.float32) for v in (*eqn.invars, *eqn.outvars)
        ]
        for kind, part in parts_of(eqn).items():
            if index == 0 and kind == "gradient of input":
                continue  # The input is the image, which needs no gradient.
            what = f"{kind} {[a.shape for a in arrays]}"
            if what not in known:
                known[what] = seconds_alone(part, arrays, devices)
            row = found.setdefault(kind, {"kind": kind, "count": 0, "gflops": 0.0, "seconds": 0.0})
            row["count"] += 1
            row["gflops"] += flops.convolution(eqn) / 1e9
            row["seconds"] += known[what]
    return list(found.values())


class Step:
    """The compiled train step of a configuration, with a state and a batch."""

    def __init__(self, config: Config):
        mesh = partitioning.make_mesh(config.mesh)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        with jax.set_mesh(mesh):
            create, abstract = abstract_state(config, optimizer, mesh)
            self._state = create()
            host = next(train_loop.batches_of(config, count=1)(0))
            self._batch = partitioning.place_batch(host, mesh)
            traced = jit_train_step(config, optimizer, abstract, mesh).trace(
                self._state, self._batch
            )
            self.compiled = traced.lower().compile()
        self.params = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        self.flops = flops.count(traced.jaxpr)

    def run(self) -> None:
        """Runs one step and waits for its end."""
        self._state, report = self.compiled(self._state, self._batch)
        jax.block_until_ready((self._state, report))


def processor_seconds(step: Step, repeats: int = 5, count: int = 10) -> float:
    """Minimum processor seconds of a step over all threads, which other processes disturb less."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(count):
            step.run()
        found.append((time.process_time() - begin) / count)
    return min(found)


class Worker:
    """Another process that runs the step of a checkout (`step_worker.py`)."""

    def __init__(self, folder: str, arguments: list[str]):
        script = pathlib.Path(__file__).with_name("step_worker.py")
        command = [sys.executable, str(script), str(pathlib.Path(folder).resolve()), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, count: int) -> tuple[float, float]:
        """Wall and processor seconds of a step, over `count` steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        wall, processor = map(float, self._process.stdout.readline().split())
        return wall, processor

    def close(self) -> None:
        self._process.communicate()


def beside(
    folders: list[str], arguments: list[str], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and processor seconds of a step of several checkouts, in turn; for each all rounds."""
    workers = [Worker(folder, arguments) for folder in folders]
    found: list[list[tuple[float, float]]] = [[] for _ in workers]
    for index in range(-1, rounds):  # The first round is not counted.
        for worker, times in zip(workers, found, strict=True):
            seconds = worker.run(STEPS)
            if index >= 0:
                times.append(seconds)
    for worker in workers:
        worker.close()
    return found


def anatomy(step: Step, config: Config, seconds: dict[str, float]) -> dict[str, Any]:
    """Prints and returns the times of convolutions and of the most expensive operations."""
    alone = convolution_rows(config, jax.device_count())
    total = sum(row["seconds"] for row in alone)
    fraction = round(total / seconds["median"], 3)
    cells = [(r["kind"], r["count"], r["seconds"], r["gflops"] / r["seconds"]) for r in alone]
    titles = ("convolutions, per device", "count", "s", "GFLOP/s")
    print(reporting.table(titles, cells))
    print(f"convolutions alone: {total:.4g} s, {fraction:.0%} of the step")
    spent = operations.seconds_by_operation(step.run, times=10)
    by_kind = operations.seconds_by_kind(spent, step.compiled.as_text())
    all_seconds = sum(by_kind.values())
    top = collections.Counter(by_kind).most_common(12)
    cells = [(kind, part * 1e3, f"{part / all_seconds:.1%}") for kind, part in top]
    print(reporting.table(("operation, all devices", "ms", "share"), cells))
    return {
        "convolutions": alone,
        "convolutions_seconds": total,
        "fraction": fraction,
        "fraction_of_fastest": round(total / seconds["min"], 3),
        "profile": {kind: round(part / all_seconds, 4) for kind, part in top},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py:base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", default="", metavar="DIR", help="other version to time")
    parser.add_argument("--only_steps", action="store_true", help="skip convolutions and profile")
    flags, rest = parser.parse_known_args()
    changes = [argument.removeprefix("--config.") for argument in rest]
    config = overrides.load(flags.config, [f"model.text_dim={train_loop.TEXT_DIM}", *changes])
    set_up_devices(config.mesh.cpu_devices)
    devices, batch = jax.device_count(), config.data.batch_size
    step = Step(config)
    result = {"benchmark": "shapes_step", "config": flags.config, **reporting.machine()}
    result |= {"batch_size": batch, "dtype": config.model.dtype, "params": step.params}
    result |= {"flops": step.flops, **reporting.compiler_says(step.compiled)}

    def timed(repeats: int) -> list[float]:
        return reporting.interleaved({"step": step.run}, repeats, SECONDS_PER_REPEAT)["step"]

    seconds, before = [] if flags.against else timed(flags.repeats), []
    if flags.against:
        same, here = [f"--config={flags.config}", *rest], str(pathlib.Path(__file__).parents[1])
        before, seconds = beside([flags.against, here], same, flags.repeats)
    if before:
        (before, theirs), (seconds, mine) = zip(*before, strict=True), zip(*seconds, strict=True)
        result["processor_s"] = {"before": min(theirs), "now": min(mine)}
        faster = sample_speed.interval([b / s for b, s in zip(theirs, mine, strict=True)])
        result["processor_speed"] = [round(number, 3) for number in faster]
    else:
        result["processor_s"] = processor_seconds(step)
    result["step"] = reporting.speed(seconds, images=batch, flops=step.flops, devices=devices)
    rows = [("step", *result["step"]["seconds"].values(), result["step"]["images_per_s"])]
    if before:
        result["before"] = reporting.speed(before, images=batch, flops=step.flops, devices=devices)
        other = result["before"]
        rows.append(("before", *other["seconds"].values(), other["images_per_s"]))
        ratio = statistics.median(b / s for b, s in zip(before, seconds, strict=True))
        result["times_faster"] = round(ratio, 3)
    print(reporting.table(("", "s", "min", "max", "images/s"), rows))
    print(f"minimum processor seconds of a step, all threads: {result['processor_s']}")
    if before:
        mean, low, high = result["processor_speed"]
        print(f"speed by processor time, now / before: {mean:.3f} [{low:.3f}, {high:.3f}]")
    if not flags.only_steps:
        result |= anatomy(step, config, result["step"]["seconds"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
