"""Checks of a run before it reads or compiles anything."""

from __future__ import annotations

from collections.abc import Collection

import jax
from etils import epath

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.training.optimizer import with_defaults


def check_writable(workdir: str) -> None:
    """Raises ConfigError where `workdir` cannot be written; before anything is compiled."""
    probe = epath.Path(workdir) / f".writable.{jax.process_index()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}); name a writable "
            "folder"
        ) from error


def check_changes(saved: Config, given: Config, workdir: str, allowed: Collection[str]) -> None:
    """Raises ConfigError where `given` differs from `saved` in a field that affects learning."""
    changes = overrides.changes(with_defaults(saved), with_defaults(given))
    for path, (old, new) in changes.items():
        if not overrides.matches_any_field(path, allowed):
            raise ConfigError(
                f"config.{path}={new!r}, but {workdir} was trained with {old!r}; set it back, "
                f"start a new --workdir, or allow it: --allow_changes={path}"
            )
