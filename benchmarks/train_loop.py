"""What the training loop costs around its jitted step.

    python benchmarks/train_loop.py [--config=configs/shapes.py:base] [--steps=200] [--repeats=5]

The same compiled step on the same batches, once in a bare loop and once inside `train` with its
data, metrics and saves (one save per run of `steps`). Prints a table and one JSON line: median,
lowest and highest of the overhead, the share by which the loop takes longer than its steps.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from imagen_jax import config_io, partitioning
from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.optimizer import make_optimizer
from imagen_jax.train import abstract_state, train
from imagen_jax.train_step import make_train_step

TEXT_DIM = 128


def batches_of(config, count=16):
    """Random batches of the stage's shapes, over and over."""
    rng = np.random.default_rng(0)
    data, n = config.data, config.data.batch_size
    made = []
    for _ in range(count):
        batch = {
            "image": rng.uniform(-1, 1, (n, data.image_size, data.image_size, 3)),
            "text_emb": rng.normal(size=(n, data.max_text_len, TEXT_DIM)),
        }
        if data.lowres_size:
            batch["lowres"] = rng.uniform(-1, 1, (n, data.lowres_size, data.lowres_size, 3))
        mask = np.ones((n, data.max_text_len), bool)
        made.append({k: v.astype(np.float32) for k, v in batch.items()} | {"text_mask": mask})
    return lambda start: itertools.islice(itertools.cycle(made), start % count, None)


def bare_seconds(config, batches, steps):
    """Seconds of `steps` steps with nothing around them."""
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        create, _ = abstract_state(config, optimizer, mesh)
        state = create()
        placed = [partitioning.place_batch(b, mesh) for b in itertools.islice(batches(0), 16)]
        step_fn = jax.jit(
            make_train_step(config, optimizer),
            donate_argnums=0,
            compiler_options=partitioning.train_step_options(),
        )
        state, report = step_fn(state, placed[0])
        jax.block_until_ready(report)
        begin = time.perf_counter()
        for index in range(steps):
            state, report = step_fn(state, placed[index % 16])
        jax.block_until_ready((state, report))
        return time.perf_counter() - begin


def loop_seconds(config, batches, steps, workdir):
    """Seconds that `train` takes for `steps` steps after its start, saves included."""
    train(config, workdir, batches, lambda line: None)
    rows = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(rows[0]), json.loads(rows[-1])
    return (last["seconds"] - first["seconds"]) * steps / (last["step"] - first["step"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py:base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    flags, rest = parser.parse_known_args()
    overrides = [argument.removeprefix("--config.") for argument in rest]
    every = max(flags.steps // 4, 1)
    config = config_io.load(
        flags.config,
        [
            f"model.text_dim={TEXT_DIM}",
            f"train.steps={flags.steps + every}",
            f"train.log_every={every}",
            f"checkpoint.every={2 * every}",
            *overrides,
        ],
    )
    set_up_devices(config.mesh.cpu_devices)
    batches, pairs = batches_of(config), []
    for _ in range(flags.repeats):
        with tempfile.TemporaryDirectory() as workdir:
            bare = bare_seconds(config, batches, flags.steps)
            pairs.append((bare, loop_seconds(config, batches, flags.steps, workdir)))
    overheads = sorted(loop / bare - 1 for bare, loop in pairs)
    for bare, loop in pairs:
        print(f"bare {bare:7.2f} s   loop {loop:7.2f} s   overhead {loop / bare - 1:+.1%}")
    device = jax.devices()[0].device_kind
    result = {
        "benchmark": "train_loop",
        "config": flags.config,
        "device": f"{jax.device_count()} x {device}",
        "steps": flags.steps,
        "ms_per_step": round(statistics.median(b for b, _ in pairs) / flags.steps * 1e3, 2),
        "overhead_median": round(statistics.median(overheads), 4),
        "overhead_min": round(overheads[0], 4),
        "overhead_max": round(overheads[-1], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
