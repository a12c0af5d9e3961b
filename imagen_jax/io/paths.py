"""Paths that the user gives: a workdir, an output, data.

Local for now: every other scheme is refused here, at one place, instead of becoming a local folder
called `gs:`.
"""

from __future__ import annotations

import os
import pathlib
import re

from etils import epath

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class PathError(ValueError):
    """A path cannot be used here; the message names the flag or field."""


def local_or_remote(path: str | os.PathLike[str], field: str) -> epath.Path:
    """The path of a flag or field of the configuration, with ~ expanded.

    Args:
      path: as the user gave it.
      field: name for the message, for example "--out" or "config.data.path".

    Raises:
      PathError: a scheme such as gs://.
    """
    text = os.fspath(path)
    if scheme := _SCHEME.match(text):
        raise PathError(
            f"{field}={text}: {scheme[1]}:// paths (object stores) are not supported here yet; "
            "give a local path"
        )
    return epath.Path(text).expanduser()


def local(path: str | os.PathLike[str], field: str) -> pathlib.Path:
    """`local_or_remote` for what is read by memory map or `pread`, which need a local file."""
    return pathlib.Path(local_or_remote(path, field))


def home(text: str) -> str:
    """`text` with ~ expanded; addresses such as gs:// stay.

    Raises:
      PathError: there is no such user, or the user has no home folder.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        name = text.partition("/")[0]
        raise PathError(
            f"{text}: the home folder {name} is unknown; give the whole path, or ./{text}"
        )
    return expanded
