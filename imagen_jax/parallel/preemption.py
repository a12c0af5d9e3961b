"""Preemption: SIGTERM sets a flag that the training loop polls before every step.

Spot machines, Kubernetes and SLURM send SIGTERM some seconds before they stop a machine. The run
then saves and exits with status RESTART, after which the launchers run the same command again.
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
    """The run received SIGTERM and has saved its state; the same command resumes it."""


class Preemption:
    """A context in which SIGTERM sets a flag instead of ending the process."""

    def __init__(self) -> None:
        self._requested, self._sync_point = False, 0
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        # Only the main thread can set a handler. With several processes, JAX's preemption service
        # replaces this handler.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
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
        """Whether to stop now; call before every step. All processes stop at the same step."""
        # JAX's service needs an increasing number; the step decreases when a run rolls back.
        self._sync_point += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._sync_point)
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
