"""Turns a training run into a stage folder: config.json, params.safetensors (EMA), card.md, text/.

--format=stablehlo writes the whole sampler of a stage as a program that runs with jax and numpy
alone; --format=diffusers a unet folder of DeepFloyd IF, for a network that has its shape. Every
form is drawn with when it is written; how far it is from the live sampler is printed.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.evaluation import report
from imagen_jax.export import convert, stablehlo
from imagen_jax.export import export as export_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder of the training run; stablehlo, diffusers: or a stage folder",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--format",
        choices=["native", "stablehlo", "diffusers"],
        default="native",
        help="native: a stage folder; stablehlo: a sampler for jax alone; diffusers: a unet folder",
    )
    parser.add_argument("--step", type=int, default=0, help="native: checkpoint; 0: the newest")
    parser.add_argument("--licence", default="", help="native: licence of the weights, for card.md")
    parser.add_argument(
        "--cards",
        default="",
        metavar="FILE[,FILE...]",
        help="native: what evaluations wrote (alignment.json ...), for card.md",
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    wiring.set_up_devices(1)
    if flags.format != "native" and (flags.step or flags.licence or flags.cards):
        raise ConfigError(
            f"--step, --licence and --cards go with --format=native, not {flags.format}"
        )
    if flags.format == "stablehlo":
        stablehlo.export_stablehlo(flags.workdir, flags.out)
    elif flags.format == "diffusers":
        convert.export_diffusers(flags.workdir, flags.out)
    else:
        cards = flags.cards.split(",") if flags.cards else []
        scores = report.score_tables(cards)
        export_lib.export(
            flags.workdir, flags.out, step=flags.step, licence=flags.licence, scores=scores
        )
