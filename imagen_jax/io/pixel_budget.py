"""One budget of pixels being decoded, for all threads and all processes of a user on a host.

A file of some kilobytes can hold ninety million pixels, and decoding takes about twenty bytes of
memory for each. `hold` admits images while their pixels fit the budget; further ones wait. Threads
share the budget by a lock, processes by record locks on a file, one byte for each UNIT, which the
kernel releases when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator

UNIT = 1 << 20  # Pixels.
UNITS = 96  # More than the largest image, `images.MAX_PIXELS`, needs.
FREE = UNIT // 2  # Images of at most so many pixels are not counted: threads bound them.
_POLL = 0.005  # Seconds.


class PixelBudget:
    """Units of pixels, some of them held by threads of this process or by other processes."""

    def __init__(self, path: str | None) -> None:
        """No unit is held.

        Args:
          path: the file that processes share; None: this process has a budget of its own.
        """
        self._path = path
        self.reset()

    def reset(self) -> None:
        """Forgets what is held: for a forked child, which inherits no record lock."""
        self._descriptor: int | None = None
        self._held: set[int] = set()
        self._turn = threading.Lock()  # Threads wait in order, so a large image is not overtaken.
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Pixels that threads of this process hold."""
        return len(self._held) * UNIT

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Waits until `pixels` fit the budget, and holds them in the context."""
        if pixels <= FREE:
            yield
            return
        units = self._acquire(min(-(-pixels // UNIT), UNITS))
        try:
            yield
        finally:
            self._release(units)

    def _acquire(self, count: int) -> list[int]:
        with self._turn:
            while True:
                with self._lock:
                    units = self._take(count)
                if units:
                    return units
                time.sleep(_POLL)

    def _take(self, count: int) -> list[int]:
        """`count` units, or none of them."""
        free = [unit for unit in range(UNITS) if unit not in self._held]
        taken: list[int] = []
        if len(free) < count:
            return taken
        for unit in free:
            if self._lock_unit(unit):
                taken.append(unit)
            if len(taken) == count:
                self._held.update(taken)
                return taken
        for unit in taken:
            self._unlock_unit(unit)
        return []

    def _release(self, units: list[int]) -> None:
        with self._lock:
            for unit in units:
                self._unlock_unit(unit)
            self._held.difference_update(units)

    def _lock_unit(self, unit: int) -> bool:
        if self._descriptor is None:
            self._descriptor = _open(self._path)
        if self._descriptor < 0:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
        except OSError as error:
            # Held by another process; any other error: a file system without locks.
            return not isinstance(error, BlockingIOError | PermissionError)
        return True

    def _unlock_unit(self, unit: int) -> None:
        if self._descriptor is not None and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, unit)


def _open(path: str | None) -> int:
    """Descriptor of the shared file; -1: there is none, or it belongs to someone else."""
    if path is None:
        return -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(descriptor)
        return -1
    return descriptor


BUDGET = PixelBudget(os.path.join(tempfile.gettempdir(), f"imagen_jax_pixels_{os.getuid()}"))
os.register_at_fork(after_in_child=BUDGET.reset)
