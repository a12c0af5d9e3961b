"""Sampling speed of this checkout relative to another one, in interleaved runs.

    git worktree add /tmp/before COMMIT
    python benchmarks/sample_speed.py --before=/tmp/before --stages=DIR[,DIR...] [--batches=1,32]

Each checkout samples in a process of its own, in turn, so that other load affects both alike; the
first samples, which compile, are not counted. On a CPU that others use, --clock=cpu counts the
processes' own time. A commit that does not know all fields of the stages' configurations needs
--before_stages: copies without these fields. Prints a row per batch size, the ratio of the speeds
(this checkout / the other; above 1: this one is faster) with its 95% interval over the rounds, and
one JSON line. Parameters and activations are float32.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import reporting
from scipy import stats

ROOT = pathlib.Path(__file__).parents[1]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def work(stages: str, clock: str) -> None:
    """Samples a batch for each line on stdin, which has its size; prints the seconds."""
    from imagen_jax.inference.cascade import Cascade

    cascade = Cascade.load(stages.split(","), text_encoder=None)
    config = cascade.configs[0]
    for line in sys.stdin:
        count = int(line)
        rng = np.random.default_rng(0)
        shape = (count, config.data.max_text_len, config.model.text_dim)
        text_emb = rng.normal(size=shape).astype(np.float32)
        text_mask = np.ones(shape[:2], bool)
        begin = CLOCKS[clock]()
        cascade.sample(text_emb=text_emb, text_mask=text_mask, batch_size=count)
        print(CLOCKS[clock]() - begin, flush=True)


class Worker:
    """A process that samples with the code of one checkout."""

    def __init__(self, checkout: str | pathlib.Path, stages: str, clock: str):
        checkout = pathlib.Path(checkout).absolute()
        stages = ",".join(str(pathlib.Path(path).absolute()) for path in stages.split(","))
        command = [sys.executable, __file__, f"--work={stages}", f"--clock={clock}"]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command,
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def seconds(self, batch: int) -> float:
        """Of one call of `Cascade.sample`."""
        self._process.stdin.write(f"{batch}\n")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, and its 95% interval by Student's t over their logarithms."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return tuple(
        float(np.exp(value)) for value in (logs.mean(), logs.mean() - half, logs.mean() + half)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="the other checkout")
    parser.add_argument("--stages", metavar="DIR[,DIR...]", help="stage folders")
    parser.add_argument("--before_stages", default="", help="stage folders for the other checkout")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of the processes")
    parser.add_argument("--work", default="", help="stage folders: be the process of a checkout")
    flags = parser.parse_args()
    if flags.work:
        return work(flags.work, flags.clock)
    before = Worker(flags.before, flags.before_stages or flags.stages, flags.clock)
    after = Worker(ROOT, flags.stages, flags.clock)
    result = {"benchmark": "sample_speed", "clock": flags.clock, **reporting.machine()}
    print(f"{'batch':>6}{'before, s':>11}{'after, s':>11}{'speed ratio':>13}  95% interval")
    for batch in map(int, flags.batches.split(",")):
        for worker in (before, after):
            worker.seconds(batch)
        rows = []
        for number in range(flags.repeats):
            pair = {}
            for worker in (before, after) if number % 2 else (after, before):
                pair[worker] = worker.seconds(batch)
            rows.append((pair[before], pair[after]))
        mean, low, high = interval([old / new for old, new in rows])
        medians = np.median(rows, axis=0)
        print(
            f"{batch:>6}{medians[0]:>11.3f}{medians[1]:>11.3f}{mean:>13.3f}  {low:.3f}-{high:.3f}",
            flush=True,
        )
        result[f"batch_{batch}"] = {"ratio": mean, "low": low, "high": high, "rounds": len(rows)}
    for worker in (before, after):
        worker.close()
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
