"""A workdir in a bucket: small files are written to a local folder and copied.

The folder is a mirror of the address (`io/mirrors.py`), made anew by every process and removed at
its end. metrics.jsonl, TensorBoard files, sample grids, faults and roll-backs are ordinary files in
it; those that changed are copied every `EVERY` seconds, before a checkpoint is committed, and at
the end. A run reads them again once it owns the workdir, as its predecessor may have written until
then, and writes them only as long as it does. Checkpoints, snapshots of averages and the owner's
record are written to the bucket itself.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from imagen_jax.io import buckets, copies, mirrors

EVERY = 60.0
# What is written to the bucket itself, or to this machine alone.
_APART = ("checkpoints", "ema", "owner", "compiled")
_NEEDED = (".json", ".jsonl")  # Files that a run or a command reads again.

_open: dict[str, _Copier] = {}


@contextlib.contextmanager
def opened(address: str, *, write: bool) -> Iterator[str]:
    """A local folder that stands for a workdir in a bucket.

    Args:
      address: of the workdir.
      write: copy what changes to the bucket, between `begin` and `end`.

    Raises:
      BucketError: the store does not answer.
    """
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    folder = mirrors.folder(address, name)
    copier = _Copier(folder, address)
    try:
        copier.pull()
        (folder / "checkpoints").mkdir(exist_ok=True)
        if write:
            _open[str(folder)] = copier
            copier.start()
        yield str(folder)
    finally:
        copier.stop()
        _open.pop(str(folder), None)
        shutil.rmtree(folder, ignore_errors=True)
        mirrors.forget(folder)


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
    """A context with a local folder for a stage folder or a workdir, which may be in a bucket.

    Errors name the address.

    Raises:
      BucketError: the store does not answer.
    """
    if not buckets.is_address(path) or buckets.tag(buckets.join(path, "config.json")):
        with copies.reading(path) as folder:
            yield folder
        return
    with opened(path, write=False) as folder, copies.renamed(folder, path):
        yield folder


def publish(workdir: str) -> None:
    """Copies the changed files of a workdir now, if it stands for one in a bucket.

    Raises:
      BucketError: the store does not answer.
      OwnershipError: another run owns the workdir.
    """
    if copier := _open.get(os.path.abspath(workdir)):
        copier.publish()


def begin(workdir: str, check_owner: Callable[[], None]) -> None:
    """Reads the files of a workdir again; from now on writes them while `check_owner` passes."""
    if copier := _open.get(os.path.abspath(workdir)):
        copier.pull()
        copier.check_owner = check_owner


def end(workdir: str) -> None:
    """Copies the changed files if it can, also of a run that failed; then writes no more."""
    if copier := _open.get(os.path.abspath(workdir)):
        copier.try_to_publish()
        copier.check_owner = None


class _Copier:
    """Copies the files of a mirror that changed."""

    def __init__(self, folder: pathlib.Path, address: str) -> None:
        self._folder, self._address = folder, address
        self._known: dict[str, tuple[int, int]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="workdir", daemon=True)
        self.check_owner: Callable[[], None] | None = None  # Nothing is written without it.

    def pull(self) -> None:
        """Copies what a run or a command reads of an earlier run."""
        names = filter(buckets.is_inside, buckets.names(self._address))
        needed = [name for name in names if self._is_copied(name) and name.endswith(_NEEDED)]

        def copy(name: str) -> None:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buckets.read(buckets.join(self._address, name)).data)
            self._known[name] = _version(path)

        with ThreadPoolExecutor(buckets.THREADS) as pool:
            list(pool.map(copy, needed))

    def publish(self) -> None:
        """Copies the changed files. Raises BucketError, and what `check_owner` does."""
        if self.check_owner is None:
            return
        self.check_owner()
        with self._lock:
            changed = {}
            for path in self._folder.rglob("*"):
                name = path.relative_to(self._folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # Replaced meanwhile.
                    if self._is_copied(name) and path.is_file():
                        changed[name] = _version(path)
            changed = {name: v for name, v in changed.items() if self._known.get(name) != v}
            # A new file is empty for a moment; one that was copied may have been emptied.
            changed = {name: v for name, v in changed.items() if v[0] or name in self._known}

            def copy(name: str) -> None:
                with contextlib.suppress(FileNotFoundError):
                    data = (self._folder / name).read_bytes()
                    buckets.write(buckets.join(self._address, name), data)
                    self._known[name] = changed[name]

            with ThreadPoolExecutor(buckets.THREADS) as pool:
                list(pool.map(copy, changed))

    def try_to_publish(self) -> None:
        """The same; a store that fails, or another owner, costs the copies, not the run."""
        with contextlib.suppress(buckets.BucketError, ValueError):
            self.publish()

    def start(self) -> None:
        """Copies from now on, every EVERY seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Copies no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self.try_to_publish()

    def _is_copied(self, name: str) -> bool:
        parts = name.split("/")
        return parts[0] not in _APART and not any(part.startswith(".") for part in parts)


def _version(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
