"""What a run reports: a progress line, a row of JSON lines, TensorBoard scalars and pictures."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np

try:
    from tensorboardX import SummaryWriter
except ImportError:  # TensorBoard files are a convenience; the JSON lines hold the same numbers.
    SummaryWriter = None


class MetricWriter:
    """Writes metrics of a run into its workdir.

    `metrics.jsonl` has one object per report: step, seconds since the start of this process, and
    the metrics. After a restart rows of steps that will be run again are cut off, so that each step
    stands there once.
    """

    def __init__(self, workdir: str, start_step: int):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._keep_rows_up_to(start_step)
        self._file = self._path.open("a")
        self._board = (
            SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=start_step + 1)
            if SummaryWriter
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
        row = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """One uint8 picture [H, W, 3], into TensorBoard."""
        if self._board:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


class Progress:
    """Turns step times into images/s and time left.

    Args:
      total: steps of the whole run.
      batch_size: pictures per step.
      log: where the line goes.
    """

    def __init__(self, total: int, batch_size: int, log: Callable[[str], None] = print):
        self._total, self._batch_size, self._log = total, batch_size, log
        self._time: float | None = None
        self._step = 0

    def start(self, step: int) -> None:
        """Starts the clock at `step`; call after compilation."""
        self._time, self._step = time.monotonic(), step

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Prints one line; returns `values` with images_per_second (since the last report)."""
        now = time.monotonic()
        steps_per_second = (step - self._step) / max(now - (self._time or now), 1e-9)
        self._time, self._step = now, step
        left = (self._total - step) / max(steps_per_second, 1e-9)
        images_per_second = steps_per_second * self._batch_size
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self._log(
            f"step {step}/{self._total}  {text}  {images_per_second:.0f} images/s  "
            f"{_clock(left)} left"
        )
        return {**values, "images_per_second": round(images_per_second, 2)}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
