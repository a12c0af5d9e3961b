"""Timing and reports of the benchmarks: statistics, JSON fields, Markdown tables in the docs."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from imagen_jax.parallel.peaks import peak_flops


def median_and_range(
    names: Sequence[str], rows: Sequence[Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each column of `rows`, one row per repeat."""
    return {
        name: {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }


def machine() -> dict[str, Any]:
    """The machine of a measurement: devices, usable cores, load average, JAX version, date."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, seconds: float = 0.3
) -> dict[str, list[float]]:
    """Seconds per call of each, measured in turn, so that other load affects all alike.

    Args:
      calls: functions by name; each returns when its work is done. The first call of each, which
        may compile, is not counted.
      repeats: number of rounds.
      seconds: minimum duration of one measurement, approximately.
    """
    counts = {}
    for name, call in calls.items():
        call()
        begin = time.perf_counter()
        call()
        counts[name] = max(1, math.ceil(seconds / (time.perf_counter() - begin)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(0.1)  # Lets the threads of the previous call stop spinning.
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            found[name].append((time.perf_counter() - begin) / counts[name])
    return found


def speed(
    seconds: Sequence[float], *, images: int, flops: float, devices: int = 1
) -> dict[str, Any]:
    """Median, minimum and maximum seconds; images/s, TFLOP/s and, on known chips, MFU.

    Args:
      seconds: seconds per call, one value per repeat.
      images: images per call.
      flops: model FLOPs per call, over all devices.
      devices: number of devices.
    """
    median = statistics.median(seconds)
    row: dict[str, Any] = {
        "seconds": {
            "median": float(f"{median:.4g}"),
            "min": float(f"{min(seconds):.4g}"),
            "max": float(f"{max(seconds):.4g}"),
        },
        "images_per_s": float(f"{images / median:.4g}"),
        "tflops_per_s": float(f"{flops / median / 1e12:.4g}"),
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak:
        row["mfu"] = round(flops / median / peak / devices, 4)
    return row


def compiler_says(compiled: jax.stages.Compiled) -> dict[str, float]:
    """The compiler's FLOPs and peak bytes of a program, per device.

    Its FLOPs count the body of a loop once and include elementwise operations.
    """
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = held - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return {"compiler_flops": float(cost.get("flops", 0.0)), "peak_bytes": int(peak)}


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [titles, ["---"] * len(titles), *[[cell(v) for v in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_between(path: str, name: str, text: str) -> None:
    """Replaces the text between the marks `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    file = pathlib.Path(path)
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, rest = file.read_text().split(begin)
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
