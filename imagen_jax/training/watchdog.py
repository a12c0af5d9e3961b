"""A run that makes no progress ends with status RESTART, after which the launchers start it again.

A collective that waits for a lost machine never returns, and no exception reaches the loop. So a
thread watches the loop: without a completed step for `train.hang_timeout` seconds it writes the
stacks of all threads and ends the process. Where a collective does fail because a peer has died,
the process ends at once: whatever would be closed regularly would wait for that peer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from etils import epath

from imagen_jax.io import buckets, mirrors
from imagen_jax.parallel import distributed
from imagen_jax.parallel.preemption import RESTART

FOLDER = "hangs"
UPLOAD_TIMEOUT = 60.0  # Seconds for the stacks of a run in a bucket.

# Status codes with which XLA and its collectives report a lost process. Those of wrong programs
# (INVALID_ARGUMENT) and full memories (RESOURCE_EXHAUSTED) are not among them.
_STATUS = re.compile(
    r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): "
)
# File systems report the same codes; what an error of this package was raised from counts only with
# one of these words.
_COLLECTIVE = re.compile(r"Gloo|NCCL|barrier|coordination|heartbeat", re.IGNORECASE)


class Watchdog:
    """A context that ends the process if the loop hangs or a peer is lost.

    Args:
      workdir: folder of the run; the stacks are written to WORKDIR/hangs, also in a bucket.
      timeout: seconds without `completed` after which the run hangs; 0: none.
      end: ends the process with a status, without closing anything.
    """

    def __init__(self, workdir: str, timeout: float, end: Callable[[int], None] = os._exit):
        self._folder, self._timeout, self._end = epath.Path(workdir) / FOLDER, timeout, end
        self._step: int | None = None
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            _end_if_peer_is_lost(error, self._end)
        self._stop.set()

    def completed(self, step: int) -> None:
        """Call when the devices have completed `step`."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while (left := self._last + self._timeout - time.monotonic()) > 0:
            if self._stop.wait(left):
                return
        done = "no step is completed" if self._step is None else f"the last is step {self._step}"
        _say(f"no completed step for {self._timeout:g} s, {done}; status {RESTART}")
        stacks = _stacks()
        print(stacks, file=sys.stderr, flush=True)
        _say(f"stacks are in {self._write(stacks)}")
        self._end(RESTART)

    def _write(self, stacks: str) -> str:
        """Writes the stacks; returns where they are."""
        path = self._folder / f"{time.strftime('%Y%m%dT%H%M%S')}.{distributed.index()}.txt"
        text = f"{socket.gethostname()}, process {os.getpid()}\n{stacks}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:  # The file system may be what hangs or fails.
            _say(f"{path} cannot be written: {error}")
        address = mirrors.origin(path)
        if address:  # The store may be what hangs.
            upload = threading.Thread(target=_upload, args=(address, text), daemon=True)
            upload.start()
            upload.join(UPLOAD_TIMEOUT)
        return address or str(path)


def _upload(address: str, text: str) -> None:
    try:
        buckets.write(address, text.encode())
    except buckets.BucketError as error:
        _say(str(error))


@contextlib.contextmanager
def restartable(end: Callable[[int], None] = os._exit) -> Iterator[None]:
    """A context that ends the process with status RESTART if another one of the run is lost.

    For what precedes the `Watchdog`: joining the run, its data, the ownership of the workdir.

    Args:
      end: ends the process with a status, without closing anything.
    """
    try:
        yield
    except Exception as error:
        _end_if_peer_is_lost(error, end)
        raise


def _end_if_peer_is_lost(error: BaseException, end: Callable[[int], None]) -> None:
    if is_lost_peer(error) and distributed.is_joined():
        reason = " ".join(str(error).split())
        _say(f"another process of the run is lost ({reason[:200]}); status {RESTART}")
        end(RESTART)


def _say(line: str) -> None:
    """Writes to the log in every process: the one that hangs need not be the first."""
    where = f"{socket.gethostname()}, process {distributed.index()}"
    print(f"imagen train: {where}: {line}", file=sys.stderr, flush=True)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, or an error it was raised from, reports a failed collective."""
    own = type(error).__module__.startswith("imagen_jax")
    sign, cause = (_COLLECTIVE, error.__cause__) if own else (_STATUS, error)
    while cause is not None:
        if isinstance(cause, ValueError | RuntimeError) and sign.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


def _stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
