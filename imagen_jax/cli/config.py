"""Prints every field of a configuration: value, meaning, and `*` where it differs from its default.

Overrides apply: `imagen config --config=configs/shapes.py:sr --config.train.steps=100`.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import config_help
from imagen_jax.config import overrides
from imagen_jax.config.describe import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    config_help.add_config(parser)


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    print("\n".join(describe(overrides.load(flags.config, flags.overrides))))
