"""The ConfigDict that a configuration file changes: an error names the path and the nearest field.

ml_collections' own error for an unknown field prints every field of the section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from imagen_jax.config.fields import ConfigError, unknown_field


class UnknownFieldError(ConfigError, AttributeError):
    """A field that does not exist; an AttributeError, so that `hasattr` answers False."""


class Section(ml_collections.ConfigDict):
    """A ConfigDict that knows its own path, for example `config.train`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_path", "config")
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_locked and key not in self:
            raise self._unknown(key)
        try:
            super().__setitem__(key, value)
        except TypeError:
            expected, got = type(self[key]).__name__, type(value).__name__
            raise ConfigError(
                f"{self._path}.{key}={value!r} must be of type {expected}, got {got}"
            ) from None

    def __getitem__(self, key: str) -> Any:
        # Python itself looks for names with an underscore, when it copies for instance.
        if key not in self and not key.startswith("_") and "." not in key:
            raise self._unknown(key)
        return super().__getitem__(key)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "_path", state["_path"])

    def _unknown(self, key: str) -> UnknownFieldError:
        return UnknownFieldError(unknown_field(f"{self._path}.{key}", key, list(self)))


def make_section(values: Any, path: str = "config") -> Section:
    """The unlocked section of a dataclass or a mapping, with all nested ones."""
    if dataclasses.is_dataclass(values):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    section = Section()
    object.__setattr__(section, "_path", path)
    for name, value in values.items():
        nested = dataclasses.is_dataclass(value) or isinstance(value, Mapping)
        section[name] = make_section(value, f"{path}.{name}") if nested else value
    return section
