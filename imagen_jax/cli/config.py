"""Prints every field of a configuration: value, meaning, and `*` where it differs from its default.

Overrides apply: `imagen config --config=configs/shapes.py:sr --config.train.steps=100`.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import config_help
from imagen_jax.config import overrides
from imagen_jax.config.describe import describe
from imagen_jax.stages.names import check_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    config_help.add_config(parser)


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = overrides.load(flags.config, flags.overrides)
    check_names(config)
    print("\n".join(describe(config)))
