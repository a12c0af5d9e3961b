"""Trains one stage; the same command again goes on from the newest checkpoint."""

from __future__ import annotations

import argparse

from imagen_jax.cli import wiring
from imagen_jax.train import train, with_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument("--workdir", required=True, help="folder of the run")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    pipeline = wiring.open_pipeline(config)
    config = with_text(config, pipeline.store.dim, pipeline.store.fingerprint)
    train(config, flags.workdir, pipeline.batches)
