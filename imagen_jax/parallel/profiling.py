"""Profiles of a few steps on request: WORKDIR/profile, for TensorBoard or xprof."""

from __future__ import annotations

import pathlib
import signal
import threading
from types import FrameType

import jax

STEPS = 5


class Profiler:
    """Traces STEPS steps from step `at`, and after every SIGUSR1.

    Args:
      workdir: folder of the run.
      at: step of the first trace; 0: none.
    """

    def __init__(self, workdir: str, at: int):
        self._folder = pathlib.Path(workdir) / "profile"
        self._requested = False
        self._at = at
        self._stop_at: int | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._request)

    def before_step(self, step: int) -> None:
        """Starts or stops a trace; call before each step."""
        if self._stop_at is not None and step >= self._stop_at:
            self.close()
        elif self._stop_at is None and (self._requested or (self._at and step == self._at)):
            jax.profiler.start_trace(str(self._folder))
            self._requested, self._stop_at = False, step + STEPS

    def close(self) -> None:
        """Ends the current trace, if any."""
        if self._stop_at is not None:
            jax.profiler.stop_trace()
            self._stop_at = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
