"""What the sections of the schema are written with: documented fields, errors with their fix."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A value of the configuration is wrong; the message gives field, got, expected and fix."""


def doc(default: Any, text: str) -> Any:
    """A dataclass field with a default and its documentation."""
    return dataclasses.field(default=default, metadata={"doc": text})


def section(cls: type, text: str) -> Any:
    """A dataclass field that holds a nested section built from its own defaults."""
    return dataclasses.field(default_factory=cls, metadata={"doc": text})


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError when `value` is none of `choices`."""
    if value not in choices:
        raise ConfigError(unknown_name(f"config.{field}", value, choices))


def unknown_name(field: str, value: str, choices: Sequence[str]) -> str:
    """The one message for a name that is not among the known ones: lists them and the closest."""
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field}={value!r} is not one of {', '.join(map(str, choices))}{hint}"
