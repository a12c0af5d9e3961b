"""Speed of the programs of a run: the network's forward pass, the train step, the sampler.

    python benchmarks/programs.py --config=configs/shapes.py:base [--stages=forward,train,sample]
                                  [--batch=N] [--repeats=5] [--trace] [--config.a.b=VALUE ...]

Times the programs that `imagen plan` compiles and `imagen train` and `imagen sample` run, at the
full size of the configuration, with initial parameters and random batches, on all devices. Reports
for each: seconds per call (median, lowest, highest of `repeats`), images/s, TFLOP/s, MFU if the
chip's peak is known; FLOPs counted from the trace (loops times their iterations, without
recomputation) and by the compiler; peak bytes; seconds of compilation. `--trace` adds the ten most
expensive operations and kinds of operation. Prints progress, tables and a JSON line; for a
process with a time limit also one as soon as a program is compiled, and one as soon as it is timed,
in which "complete" is false.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import operations
import reporting

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.inference import placement, stage_sampler
from imagen_jax.inference.stage_sampler import SamplerInputs
from imagen_jax.parallel import partitioning, topology
from imagen_jax.planning import plan
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.network import MODELS, init_params
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer

TEXT_DIM = 128  # If the configuration leaves text_dim to the embeddings.
TOP = 10


def random_like(shapes: Any) -> Any:
    """Arrays of these shapes and shardings: normal numbers, True for masks, PRNG keys."""
    rng = np.random.default_rng(0)

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.split(jax.random.key(0), leaf.shape), leaf.sharding)
        if leaf.dtype == jnp.bool_:
            return jax.device_put(np.ones(leaf.shape, bool), leaf.sharding)
        array = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    return jax.tree.map(make, shapes)


def with_sharding(shapes: Any, sharding: Any) -> Any:
    """The same shapes with this sharding."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def fresh_params(config: Config, sharding: Any) -> Any:
    """Initial parameters with this sharding."""
    init = lambda: partitioning.unbox(init_params(config, jax.random.key(0)))  # noqa: E731
    return jax.jit(
        init, out_shardings=sharding, compiler_options=partitioning.FAST_COMPILE_OPTIONS
    )()


def forward(config: Config, where: topology.Slice) -> tuple[plan.Program, Callable[..., Any]]:
    """One evaluation of the network on a batch."""
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    rows, replicated = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
    model, data, batch = config.model, config.data, config.data.batch_size
    params = fresh_params(config, replicated)
    level = jax.ShapeDtypeStruct((batch,), jnp.float32)
    z_shape = (batch, data.image_size, data.image_size, 6 if model.lowres else 3)
    words = plan.batch_shapes(config)
    shapes = {"z": jax.ShapeDtypeStruct(z_shape, jnp.float32), "logsnr": level}
    shapes |= {name: words[name] for name in ("text_emb", "text_mask")}
    inputs = random_like(with_sharding(shapes, rows))
    inputs["lowres_logsnr"] = inputs["logsnr"] if model.lowres else None
    network = MODELS[model.name](model)
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda p, inputs: network.apply({"params": p}, **inputs)).trace(
            params, inputs
        )
    program = plan.program("forward", config, batch, traced, params, (params, inputs))
    return program, lambda run: lambda: jax.block_until_ready(run(params, inputs))


def train(config: Config, where: topology.Slice) -> tuple[plan.Program, Callable[..., Any]]:
    """One train step: loss, gradient, optimizer, averages."""
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    program = plan.train_program(config, where)
    with jax.set_mesh(mesh):
        state = abstract_state(config, optimizer, mesh)[0]()
    shapes = plan.batch_shapes(config)
    batch = random_like(with_sharding(shapes, partitioning.batch_sharding(mesh)))

    def start(run: Callable[..., Any]) -> Callable[[], Any]:
        current = state

        def call() -> None:
            nonlocal current
            current, report = run(current, batch)  # The old state is donated.
            jax.block_until_ready((current, report))

        return call

    return program, start


def sample(config: Config, where: topology.Slice) -> tuple[plan.Program, Callable[..., Any]]:
    """All steps of the stage's sampler for one batch."""
    batch = config.data.batch_size
    program = plan.sample_program(config, where, batch)
    config = program.config
    settings = config.sampling
    mesh = partitioning.sampling_mesh(
        where.devices, fsdp=settings.fsdp or 1, height=settings.height
    )
    rows, replicated = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
    params = jax.tree.map(
        lambda value, shape: jax.device_put(value.astype(shape.dtype), shape.sharding),
        fresh_params(config, replicated),
        placement.abstract_params(config, mesh),
    )
    shapes = plan.batch_shapes(config)
    level = jax.ShapeDtypeStruct((batch,), jnp.float32)
    shapes["guidance_weight"] = level
    if "lowres" in shapes:
        shapes["aug_level"] = level
    del shapes["image"]
    given = random_like(with_sharding(shapes, rows))
    text = Text(given.pop("text_emb"), given.pop("text_mask"))
    keys = jax.device_put(jax.random.split(jax.random.key(0), batch), rows)
    key = stage_sampler.jit_cache_config(config)
    step_inputs, state = jax.jit(
        functools.partial(stage_sampler.init_denoising, key), out_shardings=rows
    )(SamplerInputs(text, keys, **given))
    levels = stage_sampler.noise_levels(config)
    ends = jax.device_put(tuple(levels[:2]), replicated)
    inputs = params, step_inputs, state, ends, 0, levels.count
    return program, lambda run: lambda: jax.block_until_ready(run(*inputs))


STAGES = {"forward": forward, "train": train, "sample": sample}


def measure(
    name: str,
    config: Config,
    *,
    repeats: int,
    trace: bool,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Compiles and times one program; returns its row, and reports what there is of it so far."""
    where = topology.this_machine()
    print(f"# {name}: tracing and making parameters", flush=True)
    program, start = STAGES[name](config, where)
    print(f"# {name}: compiling", flush=True)
    options = None if name == "train" else partitioning.forward_options()
    planned = plan.compile_program(program, where, options)
    print(f"# {name}: compiled in {planned.compile_seconds:.0f} s", flush=True)
    if planned.compiled is None:
        raise SystemExit(
            f"{name}: {planned.peak / 2**30:.1f} GiB do not fit; try a smaller --batch"
        )
    devices = len(where.devices)
    row: dict[str, Any] = {"program": name, "batch": program.batch, "dtype": config.model.dtype}
    row |= {"params": program.params, "flops": program.model_flops}
    row |= reporting.compiler_says(planned.compiled)
    row |= {"compile_s": round(planned.compile_seconds, 1)}
    if name == "sample":
        row["steps"] = config.sampling.steps
    report(row)
    call = start(planned.compiled)
    seconds = reporting.interleaved({name: call}, repeats)[name]
    row |= reporting.speed(
        seconds, images=program.batch, flops=program.model_flops, devices=devices
    )
    stats = where.devices[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        row["peak_bytes_in_use"] = stats["peak_bytes_in_use"]
    report(row)
    if trace:
        spent = operations.seconds_by_operation(call, times=3)
        row["top"] = dict(sorted(spent.items(), key=lambda item: -item[1])[:TOP])
        row["top_share"] = round(sum(row["top"].values()) / max(sum(spent.values()), 1e-12), 3)
        kinds = operations.seconds_by_kind(spent, planned.compiled.as_text() or "")
        row["kinds"] = dict(itertools.islice(kinds.items(), TOP))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--batch", type=int, default=0, help="0: data.batch_size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", action="store_true")
    flags, rest = parser.parse_known_args()
    changes = [argument.removeprefix("--config.") for argument in rest]
    if flags.batch:
        changes.append(f"data.batch_size={flags.batch}")
    config = overrides.load(flags.config, changes)
    if config.model.text_dim < 1:
        config = overrides.load(flags.config, [*changes, f"model.text_dim={TEXT_DIM}"])
    set_up_devices(config.mesh.cpu_devices)
    rows: list[dict[str, Any]] = []

    def report(*unfinished: dict[str, Any], complete: bool = False) -> None:
        found = {"benchmark": "programs", "config": flags.config, **reporting.machine()}
        found |= {"complete": complete, "rows": [*rows, *unfinished]}
        print(json.dumps(found), flush=True)

    for name in flags.stages.split(","):
        rows.append(measure(name, config, repeats=flags.repeats, trace=flags.trace, report=report))
    titles = ("program", "batch", "dtype", "params", "TFLOP", "compiler's", "s", "min", "max")
    titles += ("images/s", "TFLOP/s", "MFU", "peak GiB", "compile s")
    print(
        reporting.table(
            titles,
            [
                (r["program"], r["batch"], r["dtype"], f"{r['params']:,}", r["flops"] / 1e12)
                + (r["compiler_flops"] / 1e12, *r["seconds"].values(), r["images_per_s"])
                + (r["tflops_per_s"], r.get("mfu", "-"), r["peak_bytes"] / 2**30, r["compile_s"])
                for r in rows
            ],
        )
    )
    for row in rows:
        for part in ("top", "kinds"):
            for name, seconds in row.get(part, {}).items():
                print(f"{row['program']}: {seconds * 1e3:9.3f} ms  {name}")
    report(complete=True)


if __name__ == "__main__":
    main()
