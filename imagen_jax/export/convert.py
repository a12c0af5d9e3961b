"""Stage folders from and to the formats of others: DeepFloyd IF in diffusers' layout.

An imported stage runs in `sample`, is trained on by `train --config.train.init_from=STAGE`, and
goes back with `export --format=diffusers`, also after training.
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
from imagen_jax.config.schema import Config, DiffusionConfig, TextConfig
from imagen_jax.export import export
from imagen_jax.export.check import check
from imagen_jax.interop import if_unet, weights
from imagen_jax.interop.if_config import read_config
from imagen_jax.io import atomic
from imagen_jax.models.conditioning import cosine_steps
from imagen_jax.stages.folder import Stage

TEXT_LEN = 77  # tokens to which IF's captions were padded
SOURCE = "diffusers_config.json"  # beside a stage that was imported

CARD = """\
# {name}

A stage of a text-to-image cascade, imported from `{source}` (DeepFloyd IF in diffusers' layout).

| | |
|---|---|
| draws | {size}x{size} pixels{lowres} |
| parameters | {count:,} (float32) |
| text encoder | T5 v1.1 of width {text_dim}, captions padded to {text_len} tokens |
| licence | that of the weights it was imported from |
"""


def import_if(
    src: str, out: str, *, image_size: int = 0, log: Callable[[str], None] = print
) -> Config:
    """Writes a stage folder from a unet folder of IF.

    Args:
      src: folder with diffusers' config.json and weights.
      out: stage folder to write.
      image_size: side of the pictures, pixels; 0: the folder's sample_size.
      log: receives one line.

    Raises:
      WeightsError: a file is missing or damaged, or the network cannot be represented.
      ConfigError: the size of the pictures is not known, or does not fit.
      OutputError: `out` holds something else.
    """
    folder = export.stage_folder(out)
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
        # The network knows no noise beyond the ends of its table.
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
    texts = {"card.md": card, SOURCE: json.dumps(source, indent=2) + "\n"}
    export.write_stage(folder, params, config, texts)
    log(f"{folder}: {count:,} parameters of {src}, {size}x{size} pixels")
    return config


def export_diffusers(source: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes a unet folder that diffusers loads, from a run or a stage folder.

    Args:
      source: folder of a training run, whose average is taken, or a stage folder.
      out: folder to write; appears whole or not at all.
      log: receives the lines.

    Raises:
      WeightsError: diffusers has no such network; the field is named.
      StageError, CheckpointError: nothing can be read. OutputError: `out` holds something else.
      ExportError: what was written draws something else.
    """
    folder = atomic.check_replaceable(out, "config.json", "model folder")
    stage = export.read_source(source)
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
    """Raises WeightsError where the process is another than IF's pipelines have."""
    for field, wanted in (("prediction", "eps"), ("schedule", "cosine")):
        got = getattr(config.diffusion, field)
        if got != wanted:
            raise weights.WeightsError(
                f"config.diffusion.{field}={got!r} cannot be represented in IF's pipelines, "
                f"only {wanted!r}"
            )
