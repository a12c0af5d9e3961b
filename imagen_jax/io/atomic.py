"""How results reach the disk: whole or not at all, and never over something else.

What is written has another name until it is complete, so that whoever reads beside the writer, or
after it was killed, finds the old one or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any


class OutputError(ValueError):
    """An output would take the place of something else; the message names it."""


@contextlib.contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A name to write to, which becomes `path` if nothing goes wrong until the end.

    Args:
      path: the file; its folder is made if it is missing.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Writes a file of text, UTF-8; `errors` as of `str.encode`."""
    with file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as JSON that a person can read too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder that takes the place of `path` if nothing goes wrong until the end."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def check_replaceable(out: str, mark: str, kind: str) -> pathlib.Path:
    """The path of `out`, which may be there already if it is an earlier one of its kind.

    Args:
      out: what the user named.
      mark: a file that all folders of the kind have.
      kind: for the message.

    Raises:
      OutputError: a file is there, or a folder that holds something else.
    """
    path = pathlib.Path(out).absolute()
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not (path / mark).is_file():
        raise OutputError(f"--out={out} exists and is no {kind}; name a new one")
    return path
