"""Time of saving and restoring the state of a run.

    python benchmarks/checkpoints.py [--config=configs/shapes.py:base] [--repeats=5] [--folder=DIR]

The state is that of step 0: parameters, averages, optimizer slots. A save is timed until `train`
may continue (after the copy) and until all files are written; a restore until the arrays are on
their devices, with files in the operating system's cache. Prints a table and one JSON line: seconds
(median, lowest and highest) and GB/s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import jax
import reporting
import train_loop

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.parallel import partitioning
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer

NAMES = ("save_until_free", "save_until_written", "restore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py:base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; default: temporary folder")
    flags, rest = parser.parse_known_args()
    changes = [argument.removeprefix("--config.") for argument in rest]
    merged = [f"model.text_dim={train_loop.TEXT_DIM}", *changes, "checkpoint.keep=1"]
    config = overrides.load(flags.config, merged)
    set_up_devices(config.mesh.cpu_devices)
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        create, abstract = abstract_state(config, optimizer, mesh)
        state = jax.block_until_ready(create())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = []
    with tempfile.TemporaryDirectory(dir=flags.folder) as workdir:
        checkpoints = Checkpoints(workdir, config.checkpoint, access="write")
        for step in range(flags.repeats + 1):
            begin = time.perf_counter()
            checkpoints.save(step, state, config)
            free = time.perf_counter()
            checkpoints.wait()
            written = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(step, abstract))
            restored = time.perf_counter()
            rows.append((free - begin, written - begin, restored - written))
    # The first save and restore include set-up.
    found = reporting.median_and_range(NAMES, rows[1:])
    cells = [(name, *s.values(), size / s["median"] / 1e9) for name, s in found.items()]
    print(reporting.table(("", "s", "min", "max", "GB/s"), cells))
    result = {"benchmark": "checkpoints", "config": flags.config, **reporting.machine()}
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(json.dumps(result | {"bytes": size, "params": params} | found))


if __name__ == "__main__":
    main()
