"""Turns a training run into a stage folder: config.json, params.safetensors (EMA), card.md.

--format=diffusers writes a unet folder of DeepFloyd IF instead, for a network that has its shape.
"""

from __future__ import annotations

import argparse

from imagen_jax import convert
from imagen_jax import export as export_lib
from imagen_jax.cli import wiring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--workdir", required=True, help="folder of the training run; diffusers: or a stage folder"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--format",
        choices=["native", "diffusers"],
        default="native",
        help="native: a stage folder; diffusers: a unet folder",
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    wiring.set_up_devices(1)
    if flags.format == "diffusers":
        convert.export_diffusers(flags.workdir, flags.out)
    else:
        export_lib.export(flags.workdir, flags.out)
