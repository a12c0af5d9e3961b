"""Writes a stage folder from public weights: config.json, params.safetensors, card.md.

if: a unet folder of DeepFloyd IF in diffusers' layout (config.json and
diffusion_pytorch_model.safetensors or .bin), base or super-resolution.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import path_flags, wiring
from imagen_jax.export import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("kind", choices=["if"], help="format of the weights")
    path_flags.required(parser, "--src", "folder to read", bucket="read")
    path_flags.required(parser, "--out", "stage folder to write", bucket="write")
    parser.add_argument(
        "--image_size",
        type=int,
        default=0,
        help="side of the images, pixels; 0: that of config.json",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    wiring.check_least(flags, 0, "image_size")
    wiring.set_up_devices(1)
    convert.import_if(flags.src, flags.out, image_size=flags.image_size)
