"""Time and page faults of train steps on a CPU, with freed memory kept and returned.

    taskset -c 0 python benchmarks/host_memory.py [--config=configs/shapes.py:sr] [--batch=8]

Two processes run the train step in turn, one as `imagen train` does (parallel/host_memory.py), one
as glibc does by itself. Prints milliseconds and page faults of a step of both (medians), and the
ratio of the speeds (kept / returned; above 1: keeping is faster) with its 95% interval over rounds.

Hardware: one CPU core. Time: two minutes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import programs
import reporting
import sample_speed

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.config import overrides
from imagen_jax.parallel import host_memory, topology
from imagen_jax.planning import plan

MODES = ("kept", "returned")
STEPS = 5  # Of a round.


def work(spec: str, batch: int, mode: str) -> None:
    """Runs STEPS steps for each line on stdin; prints seconds and page faults of one."""
    set_up_devices(1)
    if mode == "kept":
        host_memory.keep_freed()
    changes = [f"data.batch_size={batch}", "model.text_dim=128", "mesh.cpu_devices=1"]
    config = overrides.load(spec, changes)
    program, start = programs.STAGES["train"](config, topology.this_machine())
    planned = plan.compile_program(program, topology.this_machine(), None)
    assert planned.compiled is not None
    call = start(planned.compiled)
    call()
    for _ in sys.stdin:
        begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(STEPS):
            call()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print((time.process_time() - begin) / STEPS, faults / STEPS, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py:sr")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--mode", default="", choices=("", *MODES), help="be one process")
    flags = parser.parse_args()
    if flags.mode:
        work(flags.config, flags.batch, flags.mode)
        return
    command = [sys.executable, str(pathlib.Path(__file__)), *sys.argv[1:]]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    workers = {mode: subprocess.Popen([*command, f"--mode={mode}"], **pipes) for mode in MODES}
    rows: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for number in range(1 + flags.rounds):
        for mode in MODES if number % 2 else MODES[::-1]:
            workers[mode].stdin.write("\n")
            found = [float(word) for word in workers[mode].stdout.readline().split()]
            if number:  # The first round fills the memory.
                rows[mode].append(found)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    seconds = {mode: [one[0] for one in found] for mode, found in rows.items()}
    lines = []
    for mode, found in rows.items():
        faults = statistics.median(one[1] for one in found)
        lines.append((mode, 1e3 * statistics.median(seconds[mode]), f"{faults:,.0f}"))
    print(reporting.table(("freed memory", "ms of a step", "page faults"), lines))
    ratios = [b / a for a, b in zip(seconds["kept"], seconds["returned"], strict=True)]
    mean, low, high = sample_speed.interval(ratios)
    print(f"speed, kept / returned: {mean:.3f} [{low:.3f}, {high:.3f}], {flags.rounds} rounds")
    result = {"benchmark": "host_memory", "config": flags.config, "batch": flags.batch}
    print(json.dumps({**result, **reporting.machine(), "ratio": mean, "low": low, "high": high}))


if __name__ == "__main__":
    main()
