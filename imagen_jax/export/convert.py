"""Converts stage folders from and to DeepFloyd IF in diffusers' layout.

`sample` runs an imported stage, `train --config.train.init_from=STAGE` continues its training, and
`export --format=diffusers` writes it in diffusers' layout again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config, DiffusionConfig, ModelConfig
from imagen_jax.config.text import TextConfig
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.export.check import check
from imagen_jax.export.export import read_source
from imagen_jax.interop import hf_t5, if_pipeline, if_scheduler, if_unet, weights
from imagen_jax.interop.if_config import read_config
from imagen_jax.io import atomic
from imagen_jax.stages.folder import (
    CARD_FILE,
    all_encoder_files,
    check_stage_output,
    copy_encoder,
    write_stage_files,
)
from imagen_jax.stages.stage import Stage

TEXT_LEN = 77  # tokens; IF pads captions to this length
# The original configurations, in an imported stage folder.
SOURCE, SCHEDULERS = "diffusers_config.json", "diffusers_schedulers.json"

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
    """Writes a stage folder from a pipeline folder of IF (stage I or II), or from its unet folder.

    The stage of a pipeline samples as diffusers' pipeline does. That of a unet folder, which says
    nothing of scheduler and text, samples in continuous time with masked text.

    Args:
      src: folder in diffusers' layout.
      out: stage folder to write.
      image_size: side of the images, pixels; 0: the folder's sample_size.
      log: receives one line.

    Returns:
      The configuration that was written.

    Raises:
      WeightsError: a file is missing or damaged, or the network or its scheduler cannot be
        represented.
      ConfigError: the image size is unknown or not a multiple of the network's downsampling.
      OutputError: `out` exists and is not a stage folder.
    """
    folder = check_stage_output(out)
    pipeline = if_pipeline.read(src) if if_pipeline.is_pipeline(src) else None
    unet = pathlib.Path(src) if pipeline is None else pipeline.unet
    source = read_config(unet)
    model, params = if_unet.load(unet)
    size = image_size or source.get("sample_size")
    unit = 2 ** (len(model.channels) - 1) * (4 if model.lowres else 1)
    if not isinstance(size, int) or size < 1 or size % unit:
        raise ConfigError(
            f"{src}: sample_size={size!r} must be a multiple of {unit}; give --image_size=PIXELS"
        )
    config = _config(src, pipeline, model, size)
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
    if pipeline is not None:
        texts[SCHEDULERS] = json.dumps(pipeline.schedulers, indent=2) + "\n"
    with atomic.folder(folder) as temporary:
        copied = dataclasses.replace(config, text=copy_encoder(config.text, temporary))
        write_stage_files(temporary, params, copied, texts)
    log(f"{folder}: {count:,} parameters of {src}, {size}x{size} pixels")
    return config


def _config(
    src: str, pipeline: if_pipeline.Pipeline | None, model: ModelConfig, size: int
) -> Config:
    """The configuration of an imported stage; raises as `import_if`."""
    logsnr = cosine_steps()
    text = TextConfig(max_len=TEXT_LEN)
    # The network embeds no noise level outside its table.
    diffusion = DiffusionConfig(logsnr_min=float(logsnr[-1]), logsnr_max=float(logsnr[0]))
    sampling = SamplingConfig(sampler="ddpm", threshold_percentile=95.0)
    if pipeline is not None:
        where = str(pathlib.Path(src) / "scheduler" / if_pipeline.SCHEDULER)
        diffusion = if_scheduler.process(pipeline.schedulers["scheduler"], where)
        sampling = if_scheduler.sampling(pipeline.schedulers["scheduler"], where)
        text = _text(pipeline, model)
    return Config(
        name="if_sr" if model.lowres else "if_base",
        data=DataConfig(
            image_size=size,
            lowres_size=size // 4 if model.lowres else 0,
            max_text_len=TEXT_LEN,
        ),
        text=text,
        model=model,
        diffusion=diffusion,
        sampling=dataclasses.replace(
            sampling,
            steps=50 if model.lowres else 100,
            guidance_weight=4.0 if model.lowres else 7.0,
            aug_level=0.25 if model.lowres else 0.0,
        ),
    )


def _text(pipeline: if_pipeline.Pipeline, model: ModelConfig) -> TextConfig:
    """The section `text` of a pipeline: T5 as diffusers runs it."""
    text = TextConfig(max_len=TEXT_LEN, padding="encoded", null="empty", lowercase=True)
    if pipeline.text_encoder is None:
        return text
    shape, _ = hf_t5.open_tensors(pipeline.text_encoder)
    if shape.emb_dim != model.text_dim:
        raise weights.WeightsError(
            f"{pipeline.text_encoder}: d_model={shape.emb_dim} must be {model.text_dim}, "
            "encoder_hid_dim of unet/config.json"
        )
    return dataclasses.replace(
        text,
        path=str(pipeline.text_encoder.absolute()),
        vocabulary=str(pipeline.vocabulary.absolute()) if pipeline.vocabulary else "",
    )


def export_diffusers(source: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes a folder that diffusers loads, from a run or a stage folder.

    A stage with `diffusion.schedule=cosine_steps`, as of an imported pipeline, becomes a pipeline
    folder with scheduler and text encoder; any other one a unet folder.

    Args:
      source: folder of a training run, whose moving average is taken, or a stage folder.
      out: folder to write, atomically.
      log: receives the lines.

    Returns:
      The configuration of the stage.

    Raises:
      WeightsError: diffusers has no such network or scheduler; the message names the field.
      StageError, CheckpointError: `source` cannot be read.
      OutputError: `out` exists and is not a model folder.
      ExportError: the written network samples other images than the stage.
    """
    stage = read_source(source)
    config = stage.config
    whole = config.diffusion.schedule == if_scheduler.SCHEDULE
    marker = if_pipeline.INDEX if whole else "config.json"
    folder = atomic.check_replaceable(out, marker, "model folder")
    _check_process(config)
    with atomic.folder(folder) as temporary:
        unet = temporary / "unet" if whole else temporary
        if whole:
            _save_pipeline(source, config, temporary)
        if_unet.save(
            unet,
            config.model,
            jax.tree.map(np.asarray, stage.params),
            sample_size=config.data.image_size,
            source=_imported(source, SOURCE),
        )
        _, params = if_unet.load(unet)
        check(stage, Stage(config, params), "diffusers folder", log)
    log(f"{folder}: diffusers' {'pipeline' if whole else 'UNet2DConditionModel'} of {source}")
    return config


def _imported(source: str, name: str) -> dict[str, Any] | None:
    """A file that the import wrote; None: there is none."""
    file = pathlib.Path(source) / name
    return json.loads(file.read_text()) if file.is_file() else None


def _save_pipeline(source: str, config: Config, folder: pathlib.Path) -> None:
    """Writes scheduler, text encoder and index; files of the import unchanged where they hold."""
    ours = if_scheduler.scheduler_config(config.diffusion, config.sampling)
    schedulers = {"scheduler": ours}
    if config.model.lowres:
        schedulers["image_noising_scheduler"] = ours
    imported = _imported(source, SCHEDULERS) or {}
    given = imported.get("scheduler")
    if given and if_scheduler.same(given, config.diffusion, config.sampling):
        schedulers |= imported
    if_pipeline.save(folder, schedulers, text_files=all_encoder_files(config.text))


def _check_process(config: Config) -> None:
    """Raises WeightsError where the diffusion process differs from that of IF's pipelines."""
    if config.diffusion.schedule == if_scheduler.SCHEDULE:
        return  # The scheduler is written, and checked, too.
    for field, expected in (("prediction", "eps"), ("schedule", "cosine")):
        got = getattr(config.diffusion, field)
        if got != expected:
            raise weights.WeightsError(
                f"config.diffusion.{field}={got!r} cannot be represented in IF's pipelines, "
                f"only {expected!r}"
            )
