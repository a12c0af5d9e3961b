"""Turns a training run into a stage folder: config.json, params.safetensors (EMA), card.md."""

from __future__ import annotations

import argparse

from imagen_jax import export as export_lib
from imagen_jax.cli import wiring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--out", required=True, help="stage folder to write")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    wiring.set_up_devices(1)
    export_lib.export(flags.workdir, flags.out)
