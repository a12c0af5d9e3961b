"""Flags that hold paths: their types for argparse, and the two usual kinds.

bash expands ~ only at the start of a word, so `--out=~/x` arrives as it is.
"""

from __future__ import annotations

import argparse
import os

from imagen_jax.io import paths


def required(
    parser: argparse.ArgumentParser, name: str, help: str, *, metavar: str | None = None
) -> None:
    """Adds a flag that must name a path."""
    parser.add_argument(name, required=True, type=required_flag, metavar=metavar, help=help)


def optional(
    parser: argparse.ArgumentParser, name: str, help: str, *, metavar: str | None = None
) -> None:
    """Adds a flag whose default is no path, ""."""
    parser.add_argument(name, default="", type=flag, metavar=metavar, help=help)


def flag(text: str) -> str:
    """A local path with ~ expanded; "" stays empty.

    Raises:
      ArgumentTypeError: a scheme such as gs://, or ~ without a known home folder.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme.replace("+", "").replace("-", "").replace(".", "").isalnum():
        raise argparse.ArgumentTypeError(
            f"{text}: {scheme}:// paths (object stores) are not supported here yet; give a local "
            "path"
        )
    return address(text)


def required_flag(text: str) -> str:
    """`flag` that must not be empty: "" would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a file or a folder")
    return flag(text)


def address(text: str) -> str:
    """A path, or an address such as gs://, with ~ expanded.

    Raises:
      ArgumentTypeError: ~ without a known home folder.
    """
    try:
        return paths.home(text)
    except paths.PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag_list(text: str) -> list[str]:
    """Paths separated by commas; "" is no path.

    A name may contain commas: the longest part of the text that exists is one path.

    Raises:
      ArgumentTypeError: an empty path between commas; also as `flag`.
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
