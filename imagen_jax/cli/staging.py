"""Flags that hold addresses of buckets: local copies before a verb runs, uploads after it."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from imagen_jax.cli.path_flags import Input, Output
from imagen_jax.io import buckets
from imagen_jax.io.buckets import BucketError

# Files that mark a folder as complete, for readers that list a bucket meanwhile.
MARKS = ("config.json", "samples.jsonl", "model_index.json")


@contextlib.contextmanager
def staged(flags: argparse.Namespace) -> Iterator[None]:
    """A context in which all flags are local paths; nothing is uploaded after an exception.

    Raises:
      BucketError: an input is missing, an output exists, or the store does not answer.
    """
    given = [value for value in vars(flags).values() for value in _values(value)]
    if not any(isinstance(value, Input | Output) for value in given):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="imagen_") as temporary:
        uploads: list[tuple[pathlib.Path, str]] = []
        count = 0

        def local(value: Any) -> Any:
            nonlocal count
            if not isinstance(value, Input | Output):
                return value
            count += 1
            folder = pathlib.Path(temporary) / str(count)
            folder.mkdir()
            if isinstance(value, Input):
                return str(buckets.download(value, folder))
            _check_alone(value)
            buckets.check_free(value)
            uploads.append((folder / value.rstrip("/").rpartition("/")[2], str(value)))
            return str(uploads[-1][0])

        for name, value in list(vars(flags).items()):
            found = [local(one) for one in value] if isinstance(value, list) else local(value)
            setattr(flags, name, found)
        yield
        _upload(uploads)


def _check_alone(address: str) -> None:
    """Raises BucketError in a run of several processes: each would have a part of the files."""
    from imagen_jax.parallel import distributed

    if distributed.is_planned():
        raise BucketError(f"{address}: several processes write to a folder that they share alone")


def _upload(uploads: list[tuple[pathlib.Path, str]]) -> None:
    """Uploads what the verb has written."""
    for path, address in uploads:
        if path.exists():
            number = buckets.upload(path, address, last=MARKS)
            print(f"{address}: {number} object{'s' if number > 1 else ''} uploaded")


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
