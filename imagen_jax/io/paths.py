"""Paths that the user gives: a workdir, an output, data; also the types of flags that hold paths.

Local for now: every other scheme is refused here, at one place, instead of becoming a local folder
called `gs:`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re

from etils import epath

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class PathError(ValueError, argparse.ArgumentTypeError):
    """A path cannot be used here; the message, or argparse, names the flag or field."""


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


def flag(text: str) -> str:
    """Type of a flag that holds a path: ~ is the home folder, as in the shell; "" stays empty.

    bash expands ~ only at the start of a word, so `--out=~/x` arrives as it is.

    Raises:
      PathError: a scheme such as gs://, or ~ without a known home folder.
    """
    if scheme := _SCHEME.match(text):
        raise PathError(
            f"{text}: {scheme[1]}:// paths (object stores) are not supported here yet; give a "
            "local path"
        )
    return home(text)


def required_flag(text: str) -> str:
    """`flag` that must not be empty: "" would be the working directory."""
    if not text:
        raise PathError("the path is empty; give a file or a folder")
    return flag(text)


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


def flag_list(text: str) -> list[str]:
    """Type of a flag that holds paths separated by commas; "" is no path.

    A name may contain commas: the longest part of the text that exists is one path.

    Raises:
      PathError: an empty path between commas; also as `flag`.
    """
    parts = text.split(",") if text else []
    found = []
    while parts:
        length = len(parts)
        while length > 1 and not os.path.exists(flag(",".join(parts[:length]))):
            length -= 1
        found.append(required_flag(",".join(parts[:length])))
        parts = parts[length:]
    return found
