"""The flag --config and what --help says of configurations: sections and presets."""

from __future__ import annotations

import argparse
import contextlib
import pathlib

from imagen_jax.cli import path_flags
from imagen_jax.config import overrides
from imagen_jax.config.describe import sections
from imagen_jax.config.fields import ConfigError

_PACKAGE = pathlib.Path(__file__).parents[1]


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config; overrides are `--config.a.b=VALUE` or `--config.a.b VALUE`."""
    path_flags.required(
        parser,
        "--config",
        "configuration, for example configs/shapes.py:base; --config.a.b=VALUE or "
        "--config.a.b VALUE overrides a field",
        metavar="FILE[:NAME]",
    )
    parser.epilog = _epilog()


def bundle() -> pathlib.Path:
    """Folder of configs/, launch/ and constraints.txt: the checkout's, or the wheel's copy."""
    packed = _PACKAGE / "_bundled"
    return packed if packed.is_dir() else _PACKAGE.parent


def presets() -> dict[str, list[str]]:
    """The bundled configurations: path relative to `bundle()` -> names; without broken files."""
    found = {}
    for file in sorted((bundle() / "configs").glob("*.py")):
        with contextlib.suppress(ConfigError):
            found[f"configs/{file.name}"] = overrides.names(str(file))
    return found


def _epilog() -> str:
    lines = ["sections of the configuration (`imagen config --config=FILE:NAME` lists the fields):"]
    lines += [f"  {f'config.{name}':22}{text}" for name, text in sections().items()]
    lines += ["", "presets (FILE:NAME[,NAME...]):"]
    lines += [f"  {file}:{','.join(names)}" for file, names in presets().items()]
    return "\n".join(lines)
