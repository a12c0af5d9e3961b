"""Converts stage folders from and to DeepFloyd IF in diffusers' layout.

`sample` runs an imported stage, `train --config.train.init_from=STAGE` continues its training, and
`export --format=diffusers` writes it in diffusers' layout again.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config, DiffusionConfig
from imagen_jax.config.text import TextConfig
from imagen_jax.export.check import check
from imagen_jax.export.export import read_source
from imagen_jax.interop import if_unet, weights
from imagen_jax.interop.if_config import read_config
from imagen_jax.io import atomic
from imagen_jax.models.conditioning import cosine_steps
from imagen_jax.stages.folder import CARD_FILE, check_stage_output, write_stage
from imagen_jax.stages.stage import Stage

TEXT_LEN = 77  # tokens; IF pads captions to this length
SOURCE = "diffusers_config.json"  # the original configuration, in an imported stage folder

CARD = """\
# {name}

A stage of a text-to-image cascade, imported from `{source}` (DeepFloyd IF in diffusers' layout).

| | |
|---|---|
| output | {size}x{size} pixels{lowres} |
| parameters | {count:,} (float32) |
| text encoder | T5 v1.1 of width {text_dim}, captions padded to {text_len} tokens |
| licence | that of the imported weights |
"""


def import_if(
    src: str, out: str, *, image_size: int = 0, log: Callable[[str], None] = print
) -> Config:
    """Writes a stage folder from a unet folder of IF.

    Args:
      src: folder with diffusers' config.json and weights.
      out: stage folder to write.
      image_size: side of the images, pixels; 0: the folder's sample_size.
      log: receives one line.

    Returns:
      The configuration that was written.

    Raises:
      WeightsError: a file is missing or damaged, or the network cannot be represented.
      ConfigError: the image size is unknown or not a multiple of the network's downsampling.
      OutputError: `out` exists and is not a stage folder.
    """
    folder = check_stage_output(out)
    source = read_config(src)
    model, params = if_unet.load(src)
    size = image_size or source.get("sample_size")
    unit = 2 ** (len(model.channels) - 1) * (4 if model.lowres else 1)
    if not isinstance(size, int) or size < 1 or size % unit:
        raise ConfigError(
            f"{src}: sample_size={size!r} must be a multiple of {unit}; give --image_size=PIXELS"
        )
    logsnr = cosine_steps()
    config = Config(
        name="if_sr" if model.lowres else "if_base",
        data=DataConfig(
            image_size=size,
            lowres_size=size // 4 if model.lowres else 0,
            max_text_len=TEXT_LEN,
        ),
        text=TextConfig(max_len=TEXT_LEN),
        model=model,
        # The network embeds no noise level outside its table.
        diffusion=DiffusionConfig(logsnr_min=float(logsnr[-1]), logsnr_max=float(logsnr[0])),
        sampling=SamplingConfig(
            sampler="ddpm",
            steps=50 if model.lowres else 100,
            guidance_weight=4.0 if model.lowres else 7.0,
            threshold_percentile=95.0,
            aug_level=0.25 if model.lowres else 0.0,
        ),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    card = CARD.format(
        name=config.name,
        source=src,
        size=size,
        lowres=f" from {size // 4}x{size // 4}" if model.lowres else "",
        count=count,
        text_dim=model.text_dim,
        text_len=TEXT_LEN,
    )
    texts = {CARD_FILE: card, SOURCE: json.dumps(source, indent=2) + "\n"}
    write_stage(folder, params, config, texts)
    log(f"{folder}: {count:,} parameters of {src}, {size}x{size} pixels")
    return config


def export_diffusers(source: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes a unet folder that diffusers loads, from a run or a stage folder.

    Args:
      source: folder of a training run, whose moving average is taken, or a stage folder.
      out: folder to write, atomically.
      log: receives the lines.

    Returns:
      The configuration of the stage.

    Raises:
      WeightsError: diffusers has no such network; the message names the field.
      StageError, CheckpointError: `source` cannot be read.
      OutputError: `out` exists and is not a model folder.
      ExportError: the written network samples other images than the stage.
    """
    folder = atomic.check_replaceable(out, "config.json", "model folder")
    stage = read_source(source)
    config = stage.config
    _check_process(config)
    imported = pathlib.Path(source) / SOURCE
    with atomic.folder(folder) as temporary:
        if_unet.save(
            temporary,
            config.model,
            jax.tree.map(np.asarray, stage.params),
            sample_size=config.data.image_size,
            source=json.loads(imported.read_text()) if imported.is_file() else None,
        )
        _, params = if_unet.load(temporary)
        check(stage, Stage(config, params), "diffusers folder", log)
    log(f"{folder}: diffusers' UNet2DConditionModel of {source}")
    return config


def _check_process(config: Config) -> None:
    """Raises WeightsError where the diffusion process differs from that of IF's pipelines."""
    for field, expected in (("prediction", "eps"), ("schedule", "cosine")):
        got = getattr(config.diffusion, field)
        if got != expected:
            raise weights.WeightsError(
                f"config.diffusion.{field}={got!r} cannot be represented in IF's pipelines, "
                f"only {expected!r}"
            )
