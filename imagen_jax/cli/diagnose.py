"""Contact sheets of samples of each stage beside real images; colour shift of each SR stage."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from imagen_jax.checks.diagnose import diagnose
from imagen_jax.cli import path_flags, wiring
from imagen_jax.config.schema import Config
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import images
from imagen_jax.stages.folder import check_chain, load_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import embed_prompts, load_text_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    wiring.add_stages(parser)
    path_flags.required(parser, "--out", "folder to write")
    parser.add_argument("--pictures", type=int, default=8, help="images per sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    config = wiring.load_config(flags)
    wiring.check_least(flags, 1, "pictures")
    stages = [load_stage(path) for path in flags.stages]
    check_chain([stage.config for stage in stages])
    source = open_source(config.data)
    chosen = range(min(flags.pictures, len(source)))
    captions = [source.captions(index)[0] for index in chosen]
    text = dataclasses.replace(
        stages[0].config.text, path=config.text.path or stages[0].config.text.path
    )
    text_emb, text_mask = embed_prompts(
        load_text_encoder(text),
        captions,
        batch_size=len(captions),
        max_len=stages[0].config.data.max_text_len,
    )
    words = {"text_emb": text_emb, "text_mask": text_mask}
    originals = [source.record(index).image for index in chosen]
    examples = [words | _resized(originals, stage, config) for stage in stages]
    diagnose(stages, examples, captions, flags.out, seed=flags.seed)


def _resized(originals: list[np.ndarray], stage: Stage, config: Config) -> dict[str, np.ndarray]:
    """The images at the size of the stage and, for an SR stage, at its low resolution."""
    sizes, resize_filter = stage.config.data, config.data.resize_filter
    large = [images.center_crop_resize(p, sizes.image_size, resize_filter) for p in originals]
    resized = {"image": images.to_float(np.stack(large))}
    if sizes.lowres_size:
        lowres = [images.resize_host(p, sizes.lowres_size, resize_filter) for p in large]
        resized["lowres"] = images.to_float(np.stack(lowres))
    return resized
