"""Building blocks of the schema: documented fields, their effects, and error messages."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal


class ConfigError(ValueError):
    """A value of the configuration is wrong; the message gives field, got, expected and fix."""


def doc(default: Any, text: str, *, learns: bool = True, compiled: bool = True) -> Any:
    """A dataclass field with a default and its documentation.

    Args:
      default: value of the field.
      text: what the field means, with its unit.
      learns: whether another value changes what a run learns.
      compiled: whether another value may change the compiled train step.
    """
    metadata = {"doc": text, "learns": learns, "compiled": compiled}
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, text: str, *, learns: bool = True, compiled: bool = True) -> Any:
    """A dataclass field that holds a nested section built from its own defaults.

    Args:
      cls: the section.
      text: what the section is for.
      learns: False: no field of the section changes what a run learns.
      compiled: False: no field of the section changes the compiled train step.
    """
    metadata = {"doc": text, "learns": learns, "compiled": compiled}
    return dataclasses.field(default_factory=cls, metadata=metadata)


def without_effect(cls: type, effect: Literal["learns", "compiled"]) -> tuple[str, ...]:
    """Fields and sections of a schema for which `doc` or `section` rules out an effect.

    Args:
      cls: a dataclass such as `schema.Config`.
      effect: the argument of `doc` that is False.

    Returns:
      Paths such as "data.path"; the name of an entry of a dict is *, as in "data.mixture.*.path".
    """
    found: list[str] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner, prefix = hints[field.name], field.name
        if typing.get_origin(inner) is dict:
            inner, prefix = typing.get_args(inner)[1], f"{field.name}.*"
        if not field.metadata.get(effect, True):
            found.append(field.name)
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found += [f"{prefix}.{path}" for path in without_effect(inner, effect)]
    return tuple(found)


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(unknown_name(f"config.{field}", value, choices))


def unknown_name(field: str, value: str, choices: Sequence[str]) -> str:
    """The message for an unknown name: lists the known ones and suggests the nearest."""
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field}={value!r} is not one of {', '.join(map(str, choices))}{hint}"


def unknown_field(path: str, name: str, names: Sequence[str]) -> str:
    """The message for a field that does not exist; `path` ends in `name`."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; did you mean {path[: -len(name)]}{near[0]}?" if near else ""
    return f"{path} is not a field{hint}"
