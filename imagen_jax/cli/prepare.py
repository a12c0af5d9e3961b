"""Builds a data set where needed, indexes it and lists the records that cannot be used."""

from __future__ import annotations

import argparse

from imagen_jax.cli import wiring
from imagen_jax.data.sources.registry import open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    source = open_source(config.data)
    print(f"{len(source)} usable images, fingerprint {source.fingerprint}")
    print(f"captions per image: {source.report.caption_counts()}")
