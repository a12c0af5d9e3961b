"""Reports of a training run: progress line, metrics.jsonl, and further writers of metrics.

Also throughput (images/s, TFLOP/s, MFU) and the time spent on data, checkpoints and previews.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from imagen_jax.config import plugins
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.io import atomic, images, jsonl
from imagen_jax.parallel import distributed
from imagen_jax.parallel.peaks import peak_flops
from imagen_jax.stages.loss import LOGSNR_EDGES

try:
    from tensorboardX import SummaryWriter
except ImportError:  # Optional: metrics.jsonl holds the same numbers.
    SummaryWriter = None


# Scalars of a report by which `checkpoint.keep_best` can rank; lower is better.
RANKABLE = ("loss", "x0_mse", "grad_norm")


def check_rankable(name: str, evaluated: Sequence[str] = ()) -> None:
    """Raises ConfigError unless `checkpoint.best_metric` is of every report, or `evaluated`."""
    if name not in (*RANKABLE, *evaluated):
        known = (*RANKABLE, *evaluated)
        raise ConfigError(unknown_name("config.checkpoint.best_metric", name, known))


def mean_loss_by_noise_level(bins: np.ndarray) -> dict[str, float]:
    """Mean loss by noise level, from summed loss and count [2, bins]; empty bins left out."""
    bounds = ["-inf", *(f"{edge:g}" for edge in LOGSNR_EDGES), "inf"]
    names = [f"loss/logsnr_{low}_{high}" for low, high in itertools.pairwise(bounds)]
    return {n: float(s / c) for n, s, c in zip(names, *bins, strict=True) if c > 0}


class Writer(Protocol):
    """What a metric writer does; (workdir, start step) -> Writer is a row of WRITERS.

    The first process alone creates writers: when training starts, resumes or rolls back. Values
    of steps after the start step, which an earlier writer may have received, are written again.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name; they may be NaN or infinite."""
        ...

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 image [H, W, 3]."""
        ...

    def close(self) -> None:
        """Flushes and closes files and connections."""
        ...


class JsonLines:
    """WORKDIR/metrics.jsonl, and images as WORKDIR/NAME/step_NNNNNNNN.png.

    `metrics.jsonl` has one object per report: step, seconds since the start of this process, and
    the metrics. A restart removes the rows after the restored step, so each step occurs once.
    """

    def __init__(self, workdir: str, start_step: int):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._start = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_rows_up_to(start_step)
        self._file = self._path.open("a")

    def _keep_rows_up_to(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for _, row in jsonl.read(self._path, default=None):  # A killed run leaves half a line.
            if isinstance(row, dict) and row.get("step", step + 1) <= step:
                kept.append(json.dumps(row) + "\n")
        atomic.write_text(self._path, "".join(kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row."""
        row = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one PNG file."""
        images.save_png(self._path.parent / name / f"step_{step:08d}.png", image, {})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars and images in WORKDIR/tensorboard; nothing without tensorboardX."""

    def __init__(self, workdir: str, start_step: int):
        folder = os.path.join(workdir, "tensorboard")
        self._board = None
        if SummaryWriter:
            self._board = SummaryWriter(folder, purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the finite scalars: tensorboardX prints a warning for every other value."""
        for name in (name for name in values if np.isfinite(values[name])):
            if self._board:
                self._board.add_scalar(name, values[name], step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one image."""
        if self._board:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._board:
            self._board.close()


# Metric writers by name, for `train.writers`; metrics.jsonl is always written.
WRITERS: dict[str, Callable[[str, int], Writer]] = {"tensorboard": TensorBoard}


def find_writers(names: Sequence[str]) -> list[Callable[[str, int], Writer]]:
    """The writers of `train.writers`. Raises ConfigError for an unknown name."""
    field, group = "config.train.writers", plugins.METRIC_WRITERS
    return [plugins.find(field, name, group, WRITERS) for name in names]


class MetricWriter:
    """All metric writers of a run; of several processes, the first one writes."""

    def __init__(self, workdir: str, start_step: int, names: Sequence[str] = ("tensorboard",)):
        """Args: names: writers beside metrics.jsonl, as `train.writers`."""
        create = [JsonLines, *find_writers(names)] if distributed.is_first() else []
        self._writers: list[Writer] = [new(workdir, start_step) for new in create]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of a report."""
        for writer in self._writers:
            writer.write(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 image [H, W, 3]."""
        for writer in self._writers:
            writer.write_image(step, name, image)

    def close(self) -> None:
        """Closes all writers."""
        for writer in self._writers:
            writer.close()


class Timer:
    """Wall-clock seconds of a run by kind; unmeasured time counts as "step".

    Attributes:
      total: seconds by kind since the start.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._start = self._mark = time.monotonic()

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Adds the time spent in the context to `kind`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.total[kind] = self.total.get(kind, 0.0) + time.monotonic() - begin

    def lap(self) -> dict[str, float]:
        """Seconds by kind since the last lap, and their total as `all`."""
        now = time.monotonic()
        spent = {kind: s - self._since.get(kind, 0.0) for kind, s in self.total.items()}
        seconds = {"all": now - self._mark, **spent}
        self._since, self._mark = dict(self.total), now
        return seconds

    def summary(self) -> dict[str, float]:
        """Seconds by kind over the whole run; "step" is the remainder."""
        elapsed = time.monotonic() - self._start
        return {"step": elapsed - sum(self.total.values()), **self.total}


class Progress:
    """Computes images/s, TFLOP/s, MFU, data wait and time left from step times.

    Args:
      total: steps of the whole run.
      batch_size: images per step over all hosts.
      timer: time that the loop spent on data, saves and preview samples.
      log: called with the progress line.
    """

    def __init__(
        self, total: int, batch_size: int, timer: Timer, log: Callable[[str], None] = print
    ):
        self._total, self._batch_size, self._timer, self._log = total, batch_size, timer, log
        self._step = 0
        self._flops, self._devices, self._peak = 0.0, 1, None

    def start(self, step: int, flops: float, devices: int, device_kind: str) -> None:
        """Starts the clock; call after compilation.

        Args:
          step: number of steps done.
          flops: FLOPs of one step on one device.
          devices: number of devices.
          device_kind: `jax.Device.device_kind`.
        """
        self._step, self._flops, self._devices = step, flops, devices
        self._peak = peak_flops(device_kind)
        self._timer.lap()

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Prints one line; returns `values` and the throughput since the last report."""
        seconds = self._timer.lap()
        own = {kind: s for kind, s in seconds.items() if kind not in ("all", "data")}
        training = max(seconds["all"] - sum(own.values()), 1e-9)
        steps, self._step = step - self._step, step
        images_per_second = steps * self._batch_size / training
        row = {
            **values,
            "images_per_second": images_per_second,
            "images_per_second_per_chip": images_per_second / self._devices,
            "tflops_per_chip": self._flops * steps / training / 1e12,
            "data_wait": seconds.get("data", 0.0) / training,
        }
        if self._peak:
            row["mfu"] = row["tflops_per_chip"] * 1e12 / self._peak
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if "/" not in k)
        speed = f"{images_per_second:.0f} images/s"
        if self._peak:
            speed += f"  MFU {row['mfu']:.0%}"
        left = (self._total - step) * seconds["all"] / max(steps, 1)
        self._log(f"step {step}/{self._total}  {shown}  {speed}  {_clock(left)} left")
        return {k: float(f"{v:.6g}") if k not in values else v for k, v in row.items()}


def goodput(seconds: Mapping[str, float]) -> str:
    """One line with the time of a run by kind, from `Timer.summary`."""
    total = max(sum(seconds.values()), 1e-9)
    parts = ", ".join(f"{kind} {_clock(s)}" for kind, s in sorted(seconds.items()) if s >= 0.5)
    return f"goodput {seconds['step'] / total:.0%} of {_clock(total)}: {parts}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
