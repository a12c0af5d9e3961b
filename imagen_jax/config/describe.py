"""What a configuration holds, as text: every field with its value, meaning and default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.schema import Config


def sections() -> dict[str, str]:
    """The sections of the schema: name -> meaning."""
    return {
        field.name: field.metadata["doc"]
        for field in dataclasses.fields(Config)
        if dataclasses.is_dataclass(field.default_factory)
    }


def describe(config: Config) -> list[str]:
    """One line per field: path, value, meaning; `*` and the default where the value differs."""
    rows = list(_rows(config, Config(), "config"))
    path_width = max(len(path) for path, *_ in rows)
    value_width = min(24, max(len(repr(value)) for _, value, *_ in rows))
    lines = []
    for path, value, default, meaning in rows:
        mark, suffix = ("*", f" (default: {default!r})") if value != default else (" ", "")
        lines.append(f"{mark} {path:{path_width}} = {value!r:{value_width}}  {meaning}{suffix}")
    return lines


def _rows(section: Any, default: Any, path: str) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, value, default, meaning) of every field, in the order of the schema."""
    for field in dataclasses.fields(section):
        value, fallback = getattr(section, field.name), getattr(default, field.name)
        name = f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _rows(value, fallback, name)
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for source, component in value.items():
                yield from _rows(component, ComponentConfig(), f"{name}.{source}")
        else:
            yield name, value, fallback, field.metadata["doc"]
