"""A trained stage: its configuration with its parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

from imagen_jax.config.schema import Config


class Stage(NamedTuple):
    """One trained stage of a cascade.

    Attributes:
      config: its configuration.
      params: its parameters, float32, usually the EMA.
    """

    config: Config
    params: Any
