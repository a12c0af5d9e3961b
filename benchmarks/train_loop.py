"""Overhead of the training loop beyond its jitted step.

    python benchmarks/train_loop.py [--config=configs/shapes.py:base] [--steps=200] [--repeats=5]

Times the same compiled step on the same batches in a bare loop, in `train` with metrics, and in
`train` with SAVES background saves. The overhead is the relative extra time of the loop at the save
interval of the configuration. Prints a table and one JSON line: median, lowest and highest, in
seconds.
"""

import argparse
import itertools
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
import reporting

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.parallel import partitioning
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.step import jit_train_step
from imagen_jax.training.train import train

TEXT_DIM = 128
SAVES = 4  # In a run of `steps` steps.


def batches_of(config, count=16):
    """A stream that repeats `count` random batches of the stage's shapes."""
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
    """Seconds of `steps` consecutive steps in a bare loop."""
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        create, abstract = abstract_state(config, optimizer, mesh)
        state = create()
        placed = [partitioning.place_batch(b, mesh) for b in itertools.islice(batches(0), 16)]
        step_fn = jit_train_step(config, optimizer, abstract, mesh)
        state, report = step_fn(state, placed[0])
        jax.block_until_ready(report)
        begin = time.perf_counter()
        for index in range(steps):
            state, report = step_fn(state, placed[index % 16])
        jax.block_until_ready((state, report))
        return time.perf_counter() - begin


def loop_seconds(config, batches, steps):
    """Seconds of `steps` steps in `train` after its start, including saves."""
    with tempfile.TemporaryDirectory() as workdir:
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
    changes = [argument.removeprefix("--config.") for argument in rest]
    between = max(flags.steps // SAVES, 1)

    def config_of(*more):
        length = [f"train.steps={flags.steps + between}", f"train.log_every={between}"]
        merged = [f"model.text_dim={TEXT_DIM}", *changes, *length, *more]
        return overrides.load(flags.config, merged)

    without = config_of(f"checkpoint.every={10**9}")
    saving = config_of(f"checkpoint.every={between}", "checkpoint.keep=1")
    set_up_devices(without.mesh.cpu_devices)
    every = overrides.load(flags.config, changes).checkpoint.every
    batches, rows = batches_of(without), []
    print("ms per step: bare, in the loop; seconds per save; overhead")
    for _ in range(flags.repeats):
        bare = bare_seconds(without, batches, flags.steps) / flags.steps
        loop = loop_seconds(without, batches, flags.steps) / flags.steps
        save = (loop_seconds(saving, batches, flags.steps) - loop * flags.steps) / SAVES
        rows.append((bare, loop, save, loop / bare - 1, (loop + save / every) / bare - 1))
        print(f"{bare * 1e3:7.2f} {loop * 1e3:7.2f} {save:6.2f} {rows[-1][-1]:+7.1%}")
    names = ("bare_step", "loop_step", "save", "overhead_without_saves", "overhead")
    result = {
        "benchmark": "train_loop",
        "config": flags.config,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "steps": flags.steps,
        "steps_between_saves": every,
    }
    print(json.dumps(result | reporting.median_and_range(names, rows)))


if __name__ == "__main__":
    main()
