"""What a run reports: a progress line, a row of JSON lines, TensorBoard scalars and pictures.

And where its time went: images/s, TFLOP/s, MFU, and the share of waiting, saving and drawing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from imagen_jax.parallel import distributed

try:
    from tensorboardX import SummaryWriter
except ImportError:  # TensorBoard files are a convenience; the JSON lines hold the same numbers.
    SummaryWriter = None


# Dense bfloat16 peak of one device by JAX's `device_kind`, FLOP/s, from the makers' datasheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # A device is one of the chip's two TensorCores.
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a chip, FLOP/s; None where the datasheet is not known here.

    JAX names GPUs by their full product name, so the longest known beginning decides.
    """
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class MetricWriter:
    """Writes metrics of a run into its workdir.

    `metrics.jsonl` has one object per report: step, seconds since the start of this process, and
    the metrics. After a restart rows of steps that will be run again are cut off, so that each step
    stands there once. Of several processes one writes. TensorBoard files are written beside it
    unless the workdir is a bucket.
    """

    def __init__(self, workdir: str, start_step: int):
        self._writes = distributed.is_first()
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._start = time.monotonic()
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_rows_up_to(start_step)
        self._file = self._path.open("a")
        self._board = (
            SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=start_step + 1)
            if SummaryWriter and "://" not in workdir
            else None
        )

    def _keep_rows_up_to(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a line cut short by a kill
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of scalars."""
        if not self._writes:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            # TensorBoard has no place for infinities and says so, once for each, on stderr.
            for name in (name for name in values if np.isfinite(values[name])):
                self._board.add_scalar(name, values[name], step)

    def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
        """One uint8 picture [H, W, 3], into TensorBoard."""
        if self._writes and self._board:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._writes:
            return
        self._file.close()
        if self._board:
            self._board.close()


class Timer:
    """Where the time of a run goes: seconds by kind; what is measured as nothing else is "step".

    Attributes:
      total: seconds by kind since the start.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._start = self._mark = time.monotonic()

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Adds the time spent inside to `kind`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.total[kind] = self.total.get(kind, 0.0) + time.monotonic() - begin

    def lap(self) -> dict[str, float]:
        """Seconds by kind since the last lap, and `all` of them."""
        now = time.monotonic()
        spent = {kind: s - self._since.get(kind, 0.0) for kind, s in self.total.items()}
        seconds = {"all": now - self._mark, **spent}
        self._since, self._mark = dict(self.total), now
        return seconds

    def summary(self) -> dict[str, float]:
        """Seconds by kind over the whole run; "step" is what no other kind claims."""
        whole = time.monotonic() - self._start
        return {"step": whole - sum(self.total.values()), **self.total}


class Progress:
    """Turns step times into a line and a row: images/s, TFLOP/s, MFU, data wait, time left.

    Args:
      total: steps of the whole run.
      batch_size: pictures per step over all hosts.
      timer: told how long the loop waited, saved and drew.
      log: where the line goes.
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
          step: steps done.
          flops: of one step on one device.
          devices: number of devices.
          device_kind: JAX's name of them.
        """
        self._step, self._flops, self._devices = step, flops, devices
        self._peak = peak_flops(device_kind)
        self._timer.lap()

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Prints one line; returns `values` with the speeds since the last report."""
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
    """One line on where the time of a run went, from `Timer.summary`."""
    whole = max(sum(seconds.values()), 1e-9)
    parts = ", ".join(f"{kind} {_clock(s)}" for kind, s in sorted(seconds.items()) if s >= 0.5)
    return f"goodput {seconds['step'] / whole:.0%} of {_clock(whole)}: {parts}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
