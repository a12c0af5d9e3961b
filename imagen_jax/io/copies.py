"""Local copies of files and folders in buckets that a configuration names."""

from __future__ import annotations

import atexit
import contextlib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from imagen_jax.io import buckets


def local(path: str) -> str:
    """A path as it is, or the copy of what an address in a bucket names.

    The copy is made once in a process and removed at its end.

    Raises:
      BucketError: there is nothing, or the store does not answer.
    """
    return _copy(path.rstrip("/")) if buckets.is_address(path) else path


@functools.cache
def _copy(address: str) -> str:
    folder = tempfile.mkdtemp(prefix="imagen_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(buckets.download(address, pathlib.Path(folder)))


@contextlib.contextmanager
def reading(path: str) -> Iterator[str]:
    """A context with `local(path)`; its errors name the address."""
    folder = local(path)
    with renamed(folder, path):
        yield folder


@contextlib.contextmanager
def renamed(folder: str, address: str) -> Iterator[None]:
    """A context whose errors name an address in place of a local folder."""
    try:
        yield
    except Exception as error:
        error.args = tuple(
            part.replace(folder, address) if isinstance(part, str) else part for part in error.args
        )
        raise
