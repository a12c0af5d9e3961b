"""Names that a user's own package can add: entry points and `package.module:name`.

A registry of this package is a dict. A name that is not in it is looked up among the entry points
of the registry's group, which any installed distribution can declare in its metadata, and a name of
the form `package.module:attribute` is imported. The worlds of `imagen_jax.worlds` are found in
exactly this way (`setup.py` declares their entry points).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.config.fields import ConfigError, unknown_name

TEXT_ENCODERS = "imagen_jax.text_encoders"
TFDS_BUILDERS = "imagen_jax.tfds_builders"
SCORERS = "imagen_jax.scorers"
SOURCES = "imagen_jax.sources"
METRIC_WRITERS = "imagen_jax.metric_writers"
EVALUATORS = "imagen_jax.evaluators"

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_path(name: str) -> bool:
    """Whether `name` has the form `package.module:attribute`."""
    return _PATH.fullmatch(name) is not None


def names(group: str) -> list[str]:
    """Names of the entry points that the installed distributions declare in `group`, sorted."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=group)})


def find(field: str, name: str, group: str, rows: Mapping[str, Any]) -> Any:
    """The object that `name` stands for.

    Args:
      field: what the error message calls the setting, for example "config.text.encoder".
      name: a key of `rows`, the name of an entry point, or `package.module:attribute`.
      group: entry point group, one of the constants of this module.
      rows: the registry of this package.

    Returns:
      The registry's value, or the imported object.

    Raises:
      ConfigError: nothing has that name, or it cannot be imported.
    """
    if name in rows:
        return rows[name]
    if is_path(name):
        return _load(field, name, importlib.metadata.EntryPoint(name, name, group))
    points = [p for p in importlib.metadata.entry_points(group=group) if p.name == name]
    if points:
        return _load(field, name, points[0])
    known = [*rows, *names(group)]
    raise ConfigError(
        f"{unknown_name(field, name, known)}; a name of your own is an entry point of the group "
        f"{group!r}, or package.module:name"
    )


def _load(field: str, name: str, point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{field}={name!r}: {point.value} cannot be imported ({error}); install the package "
            "that has it, or correct the name"
        ) from error
