"""Claims on units of work by workers that share only a folder, or a folder in a bucket.

A claim is a file that only one worker can create. A thread of its owner touches the file; a claim
that is not touched for `patience` seconds, by the clock of the waiting worker, belongs to a dead
worker. A claim of the next generation, which again only one worker can create, replaces it. Clocks
of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import socket
import threading
import time

from imagen_jax.io import buckets, mirrors

_HEARTBEATS = 6  # Number of touches within `patience`.


class Claims:
    """The claims of one worker; a context manager that touches the claim it holds."""

    def __init__(self, folder: pathlib.Path, patience: float) -> None:
        """Claims files of `folder`; `patience` in seconds, the same for all workers."""
        self._folder, self._patience = folder, patience
        self._held: pathlib.Path | None = None
        self._seen: dict[pathlib.Path, tuple[int | str | None, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._held is not None:
            self._remove(self._held)

    def take(self, name: str) -> bool:
        """Claims `name`; False if a live worker holds it."""
        generation = 0
        while self._mark(self._path(name, generation)) is not None:
            generation += 1
        if generation and not self._is_stale(self._path(name, generation - 1)):
            return False
        path = self._path(name, generation)
        if not self._create(path, f"{socket.gethostname()} {os.getpid()}\n"):
            return False
        self._held = path
        return True

    def release(self, name: str) -> None:
        """Removes all claims on `name`, those of dead workers included: the work is done."""
        self._held = None
        generation = 0
        while self._mark(path := self._path(name, generation)) is not None:
            self._remove(path)
            self._seen.pop(path, None)
            generation += 1

    def _path(self, name: str, generation: int) -> pathlib.Path:
        return self._folder / f".{name}.claim{generation}"

    def _is_stale(self, path: pathlib.Path) -> bool:
        """Whether the claim was not touched for `patience` seconds of this worker's clock."""
        touched, now = self._mark(path), time.monotonic()
        if touched is None:
            return False
        last, since = self._seen.get(path, (None, now))
        if touched != last:
            self._seen[path] = (touched, now)
            return False
        return now - since > self._patience

    def _beat(self) -> None:
        while not self._stop.wait(self._patience / _HEARTBEATS):
            held = self._held
            if held is not None:
                # Replaced by another worker's claim, or just released; or the store is away.
                with contextlib.suppress(OSError):
                    self._touch(held)

    def _mark(self, path: pathlib.Path) -> int | str | None:
        """What changes when a claim is touched; None: there is no such claim."""
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _create(self, path: pathlib.Path, text: str) -> bool:
        """Creates a claim; False: another worker did."""
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _touch(self, path: pathlib.Path) -> None:
        os.utime(path)

    def _remove(self, path: pathlib.Path) -> None:
        path.unlink(missing_ok=True)


class BucketClaims(Claims):
    """Claims that are objects of the bucket which the folder, a mirror, stands for."""

    def _mark(self, path: pathlib.Path) -> int | str | None:
        return buckets.tag(_address(path)) or None

    def _create(self, path: pathlib.Path, text: str) -> bool:
        try:
            # Of two workers with the same names, one may not take the other's claim for its own.
            buckets.write(_address(path), f"{text} {secrets.token_hex(8)}".encode(), new=True)
        except buckets.ExistsError:
            return False
        return True

    def _touch(self, path: pathlib.Path) -> None:
        tag = buckets.tag(_address(path))
        if tag:
            text = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
            buckets.write(_address(path), text.encode(), replaces=tag)

    def _remove(self, path: pathlib.Path) -> None:
        buckets.delete([_address(path)])


def _address(path: pathlib.Path) -> str:
    return str(mirrors.origin(path))
