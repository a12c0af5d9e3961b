"""Reads of a store that fails now and then: retried with growing waits, then an error in one line.

An error of the store says nothing about an image: a shard that is away for a minute is waited for,
so the batches are those of an undisturbed run. Nothing takes the place of what cannot be read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources.records import Reader

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # Seconds; each wait is twice the one before.
GIVE_UP_AFTER = 300.0  # Seconds of failed reads of one image.
REPORT_EVERY = 30.0  # Seconds between lines, over all threads.


class StoreError(ConfigError):
    """The data cannot be read any more, after many attempts; the message names the record."""


class PatientReader:
    """Reads images through a reader; thread-safe."""

    def __init__(self, reader: Reader, log: Callable[[str], None]) -> None:
        """Wraps `reader`; `log` gets a line while reads fail."""
        self._reader, self._log = reader, log
        self._lock, self._reported = threading.Lock(), -REPORT_EVERY

    def read(self, key: str, location: Location) -> bytes:
        """The encoded image of a record.

        Raises:
          ImageError: the data are not those of the index.
          StoreError: reads fail for `GIVE_UP_AFTER` seconds.
        """
        started, wait = time.monotonic(), FIRST_WAIT
        while True:
            try:
                return self._reader.read(key, location)
            except OSError as error:
                why = error.strerror or str(error)
                lasted = time.monotonic() - started
                if lasted + wait > GIVE_UP_AFTER:
                    raise StoreError(
                        f"config.data.path: {key} cannot be read since {lasted:.0f} s ({why}); "
                        "restore the files and run the same command again"
                    ) from error
                self._report(key, why)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _report(self, key: str, why: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._reported < REPORT_EVERY:
                return
            self._reported = now
        self._log(f"{key}: {why}; reading is tried again for {GIVE_UP_AFTER:.0f} s")
