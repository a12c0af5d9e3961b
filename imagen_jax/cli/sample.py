"""Draws pictures for prompts: NNNNN_KK.png, samples.jsonl and grid.png."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax import cascade, config_io
from imagen_jax import prompts as prompts_lib
from imagen_jax.cascade import Stage
from imagen_jax.cli import wiring
from imagen_jax.config import ConfigError, SamplingConfig, unknown_name
from imagen_jax.sample import sample
from imagen_jax.text import TextEncoder, load_text_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", help="one prompt")
    which.add_argument("--prompts", metavar="FILE", help="prompts: .txt, .csv or .jsonl")
    add_drawing(parser, samples_per_prompt=1)


def add_drawing(parser: argparse.ArgumentParser, *, samples_per_prompt: int) -> None:
    """Adds the flags of every verb that draws prompts; `samples_per_prompt` is a default."""
    parser.add_argument(
        "--stages", required=True, metavar="DIR[,DIR...]", help="stage folders, base first"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument(
        "--samples_per_prompt", type=int, default=samples_per_prompt, help="pictures per prompt"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="pictures drawn at a time")
    parser.add_argument("--cpu_devices", type=int, default=1, help="cores to share the pictures")
    parser.add_argument("--limit", type=int, default=0, help="draw the first N prompts; 0: all")
    parser.add_argument("--text_encoder", default="", help="encoder folder, if it has moved")
    parser.add_argument(
        "--stage_settings",
        metavar="JSON",
        default="{}",
        help='sampling fields by stage name, e.g. \'{"base": {"guidance_weight": 3}}\'',
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    rows = (
        [{"prompt": flags.prompt}] if flags.prompt is not None else prompts_lib.read(flags.prompts)
    )
    draw(flags, rows)


def draw(flags: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws prompt rows as the flags of `add_drawing` say."""
    for name in ("samples_per_prompt", "batch_size", "cpu_devices"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    wiring.set_up_devices(flags.cpu_devices)
    rows = rows[: flags.limit] if flags.limit > 0 else rows
    stages = [cascade.load_stage(path) for path in flags.stages.split(",")]
    cascade.check_chain([stage.config for stage in stages])
    stages = _with_settings(stages, flags.stage_settings)
    text = stages[0].config.text
    if flags.text_encoder:
        text = dataclasses.replace(text, path=flags.text_encoder)
    encoder = load_text_encoder(text)
    _check_encoder(stages, encoder)
    sample(
        stages,
        encoder,
        rows,
        flags.out,
        seed=flags.seed,
        samples_per_prompt=flags.samples_per_prompt,
        batch_size=flags.batch_size,
        checkpoint=flags.stages,
    )


def _check_encoder(stages: list[Stage], encoder: TextEncoder) -> None:
    """Raises ConfigError when a stage learned from the embeddings of another encoder."""
    given = config_io.fingerprint(encoder.fingerprint())
    for stage in stages:
        learned = stage.config.text.fingerprint
        if learned and learned != given:
            raise ConfigError(
                f"--stages: stage {stage.config.name!r} was trained with text encoder {learned}, "
                f"{stage.config.text.path} is {given}; give the right one by --text_encoder=DIR"
            )


def _with_settings(stages: list[Stage], text: str) -> list[Stage]:
    """The stages with their sampling fields replaced as --stage_settings says."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--stage_settings is not JSON: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(v, dict) for v in settings.values()):
        raise ConfigError(f"--stage_settings={text} must map stage names to mappings of fields")
    names = [stage.config.name for stage in stages]
    for name in settings:
        if name not in names:
            raise ConfigError(unknown_name("--stage_settings: stage", name, names))
    changed = []
    for stage in stages:
        values = dataclasses.asdict(stage.config.sampling) | settings.get(stage.config.name, {})
        sampling = config_io.from_dict(
            SamplingConfig, values, f"--stage_settings: {stage.config.name}"
        )
        changed.append(stage._replace(config=dataclasses.replace(stage.config, sampling=sampling)))
    return changed
