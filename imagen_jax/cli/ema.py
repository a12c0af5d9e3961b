"""Exports a stage folder with an EMA width chosen after training (post-hoc EMA).

The run must have been trained with config.ema.profiles and config.ema.snapshot_every.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import path_flags, wiring
from imagen_jax.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    path_flags.required(parser, "--workdir", "folder of the training run", bucket="run")
    parser.add_argument(
        "--sigma_rel",
        required=True,
        type=float,
        help="relative width of the average, above 0 and below 0.28: standard deviation of its "
        "profile in steps, divided by --step",
    )
    parser.add_argument(
        "--step", type=int, help="last step of the average; default: that of the last snapshot"
    )
    path_flags.optional(parser, "--text_encoder", "encoder folder, if it has moved")
    path_flags.required(parser, "--out", "stage folder to write")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    wiring.set_up_devices(1)
    export.export_average(
        flags.workdir,
        flags.out,
        sigma_rel=flags.sigma_rel,
        step=flags.step,
        text_encoder=flags.text_encoder,
    )
