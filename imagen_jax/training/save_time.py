"""Time of a save, and whether it fits into the time that a preemption leaves.

A save goes on in the background. The loop sees its end between two steps, so its time is known up
to that of a step. At a preemption the run saves within `checkpoint.grace` seconds, or loses the
steps since the checkpoint before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from imagen_jax.training.checkpoint import Checkpoints


class SaveTime:
    """Measures the saves of one run.

    Args:
      checkpoints: of the run.
      grace: seconds from SIGTERM to the end of the machine.
      log: called with one line per save.
    """

    def __init__(self, checkpoints: Checkpoints, grace: float, log: Callable[[str], None]):
        self._checkpoints, self._grace, self._log = checkpoints, grace, log
        self._step: int | None = None
        self._bytes, self._begin = 0, 0.0

    def begin(self, step: int, state: Any) -> None:
        """Call before the save of `step` starts; it waits for the save before, as Orbax does."""
        if self._step is not None:
            self._checkpoints.wait()
            self.poll()
        self._step, self._begin = step, time.monotonic()
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def poll(self) -> None:
        """Logs the save under way once it has ended; call after every step."""
        if self._step is None or self._checkpoints.is_saving():
            return
        seconds = max(time.monotonic() - self._begin, 1e-3)
        rate = self._bytes / seconds
        size, speed = f"{self._bytes / 1e9:.3g} GB", f"{rate / 1e9:.3g} GB/s"
        self._log(f"checkpoint of step {self._step}: {size} in {seconds:.1f} s, {speed}")
        if seconds > self._grace:
            self._log(
                f"a preemption may lose steps: {size} at {speed} take {seconds:.0f} s, "
                f"config.checkpoint.grace={self._grace:g}; use storage or a mesh with more "
                "bandwidth, or lower config.checkpoint.every"
            )
        self._step = None
