"""From a training run to a stage folder: EMA parameters, configuration and a model card."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np

from imagen_jax import config_io, partitioning, stage
from imagen_jax.checkpoint import CheckpointError, Checkpoints
from imagen_jax.config import CheckpointConfig, Config
from imagen_jax.interop import weights

CARD = """\
# {name}

A stage of a text-to-image cascade, trained with imagen_jax.

| | |
|---|---|
| draws | {image_size}x{image_size} pixels{lowres} |
| parameters | {count:,} (float32, exponential moving average) |
| trained for | {step} steps of {batch_size} pictures |
| data | {kind} `{path}` {dataset} |
| text encoder | {encoder} `{encoder_path}` |
| licence | not stated |
"""


def export(workdir: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes `OUT/{config.json, params.safetensors, card.md}` from the newest checkpoint.

    The folder appears whole or not at all; an older one of the same name is replaced.

    Raises:
      CheckpointError: there is no checkpoint, it cannot be read, or `out` holds something else.
    """
    folder = pathlib.Path(out).absolute()
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not (folder / "params.safetensors").is_file():
        raise CheckpointError(f"--out={out} exists and is no stage folder; name a new one")
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(f"--workdir={workdir} holds no checkpoints; train first")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(f"--workdir={workdir} holds no complete checkpoint; train first")
    config = checkpoints.restore_config(step)
    params = checkpoints.restore_ema(step, _abstract_params(config))
    checkpoints.close()

    text_path = config.text.path and str(pathlib.Path(config.text.path).absolute())
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, path=text_path))
    flat = weights.flatten(jax.tree.map(np.asarray, params))
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights.write_safetensors(temporary / "params.safetensors", flat)
    (temporary / "config.json").write_text(config_io.to_json(config))
    (temporary / "card.md").write_text(_card(config, step, sum(a.size for a in flat.values())))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    log(f"{folder}: step {step} of {workdir}")
    return config


def _abstract_params(config: Config):
    boxed = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partitioning.unbox(boxed),
    )


def _card(config: Config, step: int, count: int) -> str:
    lowres = config.data.lowres_size
    return CARD.format(
        name=config.name,
        image_size=config.data.image_size,
        lowres=f" from {lowres}x{lowres}" if lowres else "",
        count=count,
        step=step,
        batch_size=config.data.batch_size,
        kind=config.data.kind,
        path=config.data.path,
        dataset=config.data.name if config.data.kind == "tfds" else "",
        encoder=config.text.encoder,
        encoder_path=config.text.path,
    )
