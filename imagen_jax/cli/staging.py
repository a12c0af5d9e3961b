"""Flags that hold addresses of buckets: local copies before a verb runs, uploads after it."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from imagen_jax.cli.path_flags import Copy, Input, Output, Workdir
from imagen_jax.io import buckets, copies
from imagen_jax.io.buckets import BucketError

# Files that mark a folder as complete, for readers that list a bucket meanwhile.
MARKS = ("config.json", "samples.jsonl", "model_index.json")


@contextlib.contextmanager
def staged(flags: argparse.Namespace) -> Iterator[None]:
    """A context in which all flags are local paths; nothing is uploaded after an exception.

    The local files are removed at the end, except for results that cannot be uploaded.

    Raises:
      BucketError: an input is missing, an output exists, or the store does not answer.
    """
    if isinstance(getattr(flags, "workdir", ""), Workdir):
        with _run_in_bucket(flags), staged(flags):
            yield
        return
    if not any(_holds_address(value) for value in vars(flags).values()):
        yield
        return
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="imagen_"))
    keep = False
    try:
        with _ended_by_exception():
            uploads = _make_local(flags, temporary)
            yield
            try:
                _upload(uploads)
            except Exception as error:  # Samples of hours are not to be lost.
                keep = True
                paths = ", ".join(str(path) for path, _ in uploads)
                raise BucketError(f"{error}; the results are kept in {paths}") from error
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _run_in_bucket(flags: argparse.Namespace) -> Iterator[None]:
    """A context in which --workdir is a local folder; errors name the address."""
    from imagen_jax.training import workdirs

    address = str(flags.workdir)
    with workdirs.opened(address, write=flags.verb == "train") as folder:
        flags.workdir = folder
        with copies.renamed(folder, address):
            yield


def _holds_address(value: Any) -> bool:
    if isinstance(value, list):  # Of a flag that is repeated, a list of lists.
        return any(map(_holds_address, value))
    return isinstance(value, Input | Output)


def _make_local(
    flags: argparse.Namespace, temporary: pathlib.Path
) -> list[tuple[pathlib.Path, str]]:
    """Replaces the addresses in `flags`; returns what to upload: (path, address)."""
    uploads: list[tuple[pathlib.Path, str]] = []
    count = 0

    def local(value: Any) -> Any:
        nonlocal count
        if isinstance(value, list):
            return [local(one) for one in value]
        if not isinstance(value, Input | Output):
            return value
        count += 1
        folder = temporary / str(count)
        folder.mkdir()
        if isinstance(value, Input):
            return Copy(str(buckets.download(value, folder)), value)
        _check_alone(value)
        buckets.check_free(value)
        uploads.append((folder / value.rstrip("/").rpartition("/")[2], str(value)))
        return str(uploads[-1][0])

    for name, value in list(vars(flags).items()):
        setattr(flags, name, local(value))
    return uploads


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(number: int, frame: Any) -> NoReturn:
    del frame
    raise SystemExit(128 + number)


def _check_alone(address: str) -> None:
    """Raises BucketError in a run of several processes: each would have a part of the files."""
    from imagen_jax.parallel import distributed

    if distributed.is_planned():
        raise BucketError(f"{address}: several processes write to a folder that they share alone")


def _upload(uploads: list[tuple[pathlib.Path, str]]) -> None:
    """Uploads what the verb has written. Raises BucketError: nothing, or the store refuses it."""
    for path, address in uploads:
        if not path.exists():
            raise BucketError(f"{address}: nothing was written under this name; check its suffix")
        number = buckets.upload(path, address, last=MARKS)
        print(f"{address}: {number} object{'' if number == 1 else 's'} uploaded")
