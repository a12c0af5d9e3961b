"""Turns a run's snapshots into a stage folder whose EMA width is chosen now, after training.

The run must have had config.ema.profiles and config.ema.snapshot_every set.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import wiring
from imagen_jax.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument(
        "--sigma_rel",
        required=True,
        type=float,
        help="relative width of the average, above 0 and below 0.28: its standard deviation in "
        "steps over the steps trained",
    )
    parser.add_argument("--step", type=int, help="where the average ends; default: last snapshot")
    parser.add_argument("--out", required=True, help="stage folder to write")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    wiring.set_up_devices(1)
    export.export_average(flags.workdir, flags.out, sigma_rel=flags.sigma_rel, step=flags.step)
