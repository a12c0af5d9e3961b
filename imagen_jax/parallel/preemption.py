"""Being told to stop: SIGTERM becomes a question that the training loop asks between steps.

Spot machines, Kubernetes and SLURM send SIGTERM some seconds before they take the machine away.
The run then saves and ends with exit status RESTART, which the launchers answer by starting the
same command again.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

RESTART = 75  # EX_TEMPFAIL of sysexits.h: try again later.


class Preempted(Exception):
    """The run was asked to stop and has saved everything; the same command goes on."""


class Preemption:
    """A context in which SIGTERM does not end the process but is remembered."""

    def __init__(self) -> None:
        self._asked, self._sync_point = False, 0
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        # Handlers belong to the main thread. Processes that join a run have JAX's service listen
        # from then on, which takes this handler's place.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self) -> bool:
        """Whether to stop now, asked before every step; all processes of a run stop at the same."""
        # JAX's service agrees on a number that only grows; steps go back when a run rolls back.
        self._sync_point += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._sync_point)
        return self._asked

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
