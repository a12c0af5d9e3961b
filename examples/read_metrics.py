"""Prints a summary of WORKDIR/metrics.jsonl and writes a chart of the loss.

    python examples/read_metrics.py --workdir=runs/base --chart=loss.svg

A row of metrics.jsonl is one JSON object: step, seconds since the start of the process, and the
metrics of docs/training.md. A restart resets `seconds` and removes rows of repeated steps.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from imagen_jax.evaluation import charts
from imagen_jax.evaluation.charts import Point
from imagen_jax.io import jsonl

Row = dict[str, Any]


def read(workdir: str) -> list[Row]:
    """The rows of steps in order; without evaluations and a killed run's truncated last line."""
    lines = jsonl.read(pathlib.Path(workdir) / "metrics.jsonl", default=None)
    return [row for _, row in lines if row is not None and "loss" in row]


def smoothed(rows: Sequence[Row], name: str, window: int) -> list[Point]:
    """Moving average over the last `window` rows."""
    points = []
    for end in range(1, len(rows) + 1):
        values = [row[name] for row in rows[max(end - window, 0) : end]]
        points.append(Point(rows[end - 1]["step"], statistics.fmean(values)))
    return points


def summary(rows: Sequence[Row]) -> list[str]:
    """Summary lines: steps, error, throughput, skipped updates, loss by noise level."""
    tenth = max(len(rows) // 10, 1)
    first, last = rows[:tenth], rows[-tenth:]

    def mean(part: Sequence[Row], name: str) -> float:
        return statistics.fmean(row[name] for row in part)

    lines = [
        f"steps {rows[0]['step']} to {rows[-1]['step']}, {len(rows)} rows",
        f"x0_mse {mean(first, 'x0_mse'):.4g} in the first tenth, {mean(last, 'x0_mse'):.4g} in "
        "the last",
        f"{mean(last, 'images_per_second'):.1f} images/s, {mean(last, 'data_wait'):.1%} of the "
        "time waiting for batches",
        f"{rows[-1]['skipped']:.0f} updates skipped (not finite)",
    ]
    if "mfu" in rows[-1]:
        lines.append(f"MFU {mean(last, 'mfu'):.1%}")
    # Loss by noise level, from nearly clean images to nearly pure noise.
    levels = sorted({name for row in last for name in row if name.startswith("loss/logsnr")})
    for name in levels:
        known = [row[name] for row in last if name in row]
        low, high = name.removeprefix("loss/logsnr_").split("_")
        lines.append(f"loss at logsnr {low} .. {high}: {statistics.fmean(known):.4g}")
    return lines


def main() -> None:
    """Prints the summary; writes the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--chart", default="", help="SVG to write")
    parser.add_argument("--window", type=int, default=10, help="rows of the moving mean")
    flags = parser.parse_args()
    rows = read(flags.workdir)
    print("\n".join(summary(rows)))
    if flags.chart:
        lines = {name: smoothed(rows, name, flags.window) for name in ("loss", "x0_mse")}
        chart = charts.line_chart(lines, title=flags.workdir, x_label="step", y_label="loss")
        pathlib.Path(flags.chart).write_text(charts.to_svg(chart))


if __name__ == "__main__":
    main()
