"""Flags that hold paths: their types for argparse, and the two usual kinds.

bash expands ~ only at the start of a word, so `--out=~/x` arrives as it is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Literal

from imagen_jax.io import buckets, paths


class Input(str):
    """An address in a bucket whose file or folder a verb reads; `staging` makes it local."""


class Output(str):
    """An address in a bucket to which `staging` uploads what a verb writes."""


class Workdir(str):
    """The address of a run in a bucket; `staging` replaces it by a local folder for the time."""


class Copy(str):
    """A local copy of what is at `address` in a bucket."""

    address: str

    def __new__(cls, path: str, address: str):
        copy = super().__new__(cls, path)
        copy.address = str(address)
        return copy


Bucket = Literal["", "read", "write", "run"]


def recorded(paths: list[str]) -> str:
    """Paths as results record them, separated by commas: addresses instead of local copies."""
    return ",".join(path.address if isinstance(path, Copy) else path for path in paths)


def required(
    parser: argparse.ArgumentParser,
    name: str,
    help: str,
    *,
    metavar: str | None = None,
    bucket: Bucket = "",
) -> None:
    """Adds a flag that must name a path; `bucket`: what an address in a bucket is for."""
    kinds = {"": required_flag, "read": required_input, "write": required_output}
    kind = {**kinds, "run": workdir_flag}[bucket]
    parser.add_argument(name, required=True, type=kind, metavar=metavar, help=help)


def optional(
    parser: argparse.ArgumentParser,
    name: str,
    help: str,
    *,
    metavar: str | None = None,
    bucket: Bucket = "",
) -> None:
    """Adds a flag whose default is no path, ""; `bucket` as in `required`."""
    kind = {"": flag, "read": input_flag, "write": output_flag, "run": workdir_flag}[bucket]
    parser.add_argument(name, default="", type=kind, metavar=metavar, help=help)


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


def input_flag(text: str) -> str:
    """`flag`, or an address in a bucket, as an `Input`."""
    return Input(text) if buckets.is_address(text) else flag(text)


def required_input(text: str) -> str:
    """`input_flag` that must not be empty."""
    return Input(text) if buckets.is_address(text) else required_flag(text)


def output_flag(text: str) -> str:
    """`flag`, or an address in a bucket, as an `Output`."""
    return Output(text) if buckets.is_address(text) else flag(text)


def required_output(text: str) -> str:
    """`output_flag` that must not be empty."""
    return Output(text) if buckets.is_address(text) else required_flag(text)


def workdir_flag(text: str) -> str:
    """`required_flag`, or an address in a bucket, as a `Workdir`."""
    return Workdir(text.rstrip("/")) if buckets.is_address(text) else required_flag(text)


def address(text: str) -> str:
    """A path, or an address such as gs://, with ~ expanded.

    Raises:
      ArgumentTypeError: ~ without a known home folder.
    """
    try:
        return paths.home(text)
    except paths.PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def input_list(text: str) -> list[str]:
    """`flag_list` whose paths may be addresses in buckets; these hold no commas."""
    found: list[str] = []
    local: list[str] = []
    for part in [*text.split(","), None] if text else []:
        if part is not None and not buckets.is_address(part):
            local.append(part)
            continue
        found += flag_list(",".join(local)) if local else []
        found += [Input(part)] if part is not None else []
        local = []
    return found


def adapter_list(text: str) -> list[str]:
    """`flag_list` of [STAGE=]PATH[@WEIGHT], whose paths may be addresses in buckets."""
    return flag_list(text, _adapter)


def _adapter(text: str) -> str:
    _, equals, path = text.partition("=")
    path = path if equals else text
    if buckets.is_address(path):
        return text
    flag(path)
    return required_flag(text)


def flag_list(text: str, one: Callable[[str], str] = required_flag) -> list[str]:
    """Paths separated by commas; "" is no path.

    A name may contain commas: the longest part of the text that exists is one path.

    Args:
      text: of the flag.
      one: checks and expands a path.

    Raises:
      ArgumentTypeError: an empty path between commas; also as `flag`.
    """
    parts = text.split(",") if text else []
    found = []
    while parts:
        length = len(parts)
        while length > 1 and not os.path.exists(one(",".join(parts[:length]))):
            length -= 1
        found.append(one(",".join(parts[:length])))
        parts = parts[length:]
    return found
