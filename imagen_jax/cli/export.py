"""Writes a stage folder from a training run: config.json, params.safetensors (EMA), card.md, text/.

--format=stablehlo writes the sampler of a stage as a program that needs jax and numpy only;
--format=diffusers writes a unet folder of DeepFloyd IF, for a network of its shape. Every export
samples with what it wrote and prints the difference from the live sampler. A LoRA is merged;
--format=lora writes it alone, for `sample --loras`, diffusers and peft.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import path_flags, wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.evaluation import report
from imagen_jax.export import adapters, convert, stablehlo
from imagen_jax.export import export as export_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    path_flags.required(
        parser,
        "--workdir",
        "folder of the training run; for stablehlo and diffusers, or a stage folder",
        bucket="run",
    )
    path_flags.required(parser, "--out", "folder to write", bucket="write")
    parser.add_argument(
        "--format",
        choices=["native", "stablehlo", "diffusers", "lora"],
        default="native",
        help="native: a stage folder; stablehlo: a sampler for jax; diffusers: a unet folder; "
        "lora: the LoRA of a run",
    )
    parser.add_argument(
        "--step", type=int, default=0, help="native, lora: checkpoint; 0: the newest"
    )
    path_flags.optional(parser, "--text_encoder", "native: encoder folder, if it has moved")
    parser.add_argument("--licence", default="", help="native: licence of the weights, for card.md")
    parser.add_argument(
        "--cards",
        default="",
        type=path_flags.flag_list,
        metavar="FILE[,FILE...]",
        help="native: files written by evaluations (alignment.json ...), for card.md",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    wiring.set_up_devices(1)
    described = flags.licence or flags.cards or flags.text_encoder
    if flags.format != "native" and (described or (flags.step and flags.format != "lora")):
        raise ConfigError(
            "--step, --licence, --cards and --text_encoder go with --format=native, not "
            f"{flags.format}"
        )
    if flags.format == "lora":
        adapters.export_lora(flags.workdir, flags.out, step=flags.step)
    elif flags.format == "stablehlo":
        stablehlo.export_stablehlo(flags.workdir, flags.out)
    elif flags.format == "diffusers":
        convert.export_diffusers(flags.workdir, flags.out)
    else:
        scores = report.score_tables(flags.cards)
        export_lib.export(
            flags.workdir,
            flags.out,
            step=flags.step,
            licence=flags.licence,
            scores=scores,
            text_encoder=flags.text_encoder,
        )
