"""Runs an Apache Beam pipeline with the options of a command line.

The pipelines of this package write the files that the local commands write, by the same functions:
the rows and keys of a shard are a task, and what compares records of several shards is a group of
those whose hashes begin alike. Workers and the command share the folder of the index.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.io import atomic

_LIST = ".beam_files.json"


def run(options: str, build: Callable[[Any, Any], Any], out: pathlib.Path) -> list[str]:
    """Runs a pipeline and waits for its end.

    Args:
      options: NAME or NAME=VALUE of Beam's pipeline options, separated by commas.
      build: called with the module apache_beam and the pipeline; adds the steps and returns the
        names of the files that they write.
      out: a folder that the workers share.

    Returns:
      The names, sorted. They are opened by name: a network file system may list a folder as it was.

    Raises:
      ConfigError: Beam is not installed, there is no such option, or the pipeline failed.
    """
    try:
        beam = importlib.import_module("apache_beam")
        settings = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise ConfigError(
            f"--beam_options needs the module {error.name!r}; see docs/data.md for its installation"
        ) from None
    flags = _flags(options)
    _check(settings.PipelineOptions, flags)
    try:
        with beam.Pipeline(options=settings.PipelineOptions(flags=flags)) as pipeline:
            names = build(beam, pipeline) | "name" >> beam.Map(lambda name: (0, name))
            listed = names | "all names" >> beam.GroupByKey()
            _ = listed | "list" >> beam.Map(_write_list, path=out / _LIST)
    except Exception as error:
        raise ConfigError(
            f"--beam_options={options}: the pipeline ended ({_reason(error)}); run the same "
            "command again, it continues there"
        ) from error
    names = json.loads((out / _LIST).read_text("utf-8"))
    (out / _LIST).unlink()
    return sorted(names)


def partitions(count: int, largest: int) -> int:
    """Bits of a hash by which `count` records are divided into groups of about `largest`."""
    return min(max((-(-count // largest) - 1).bit_length(), 4), 16)


def _write_list(group: tuple[int, Iterable[str]], path: pathlib.Path) -> None:
    atomic.write_text(path, json.dumps(list(group[1])))


def _flags(options: str) -> list[str]:
    given = [option.strip().removeprefix("--") for option in options.split(",")]
    return [f"--{option}" for option in given if option]


def _check(kind: Any, flags: Sequence[str]) -> None:
    """Raises ConfigError: an option that no runner of Beam has, which Beam would ignore."""
    known = kind(flags=[]).get_all_options()
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if name not in known and name.removeprefix("no_") not in known:
            raise ConfigError(unknown_name("--beam_options", name, sorted(known)))


def _reason(error: BaseException) -> str:
    """The last line of an error that says something, without the step of the pipeline."""
    text = re.sub(r"\[while running '.*", "", str(error), flags=re.DOTALL).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
