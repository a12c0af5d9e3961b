"""From a training run to a stage folder: averaged parameters, configuration and a model card.

The parameters are the ordinary average of the newest checkpoint (`export`), or a power-function
average of any width, put together from the run's snapshots (`export_average`). `convert` does the
same for the formats of others.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax import config_io, ema, ema_snapshots, partitioning, stage
from imagen_jax.checkpoint import CheckpointError, Checkpoints
from imagen_jax.config import CheckpointConfig, Config, check_sigma_rel
from imagen_jax.interop import weights

CARD = """\
# {name}

A stage of a text-to-image cascade, trained with imagen_jax.

| | |
|---|---|
| draws | {image_size}x{image_size} pixels{lowres} |
| parameters | {count:,} (float32, {average}) |
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
    folder = stage_folder(out)
    params, config, step = newest_average(workdir)
    config = _write(folder, params, config, step, "exponential moving average")
    log(f"{folder}: step {step} of {workdir}")
    return config


def newest_average(workdir: str) -> tuple[Any, Config, int]:
    """Averaged parameters, configuration and step of a run's newest checkpoint.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(f"--workdir={workdir} holds no checkpoints; train first")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(f"--workdir={workdir} holds no complete checkpoint; train first")
    config = checkpoints.restore_config(step)
    params = checkpoints.restore_ema(step, _abstract_params(config))
    checkpoints.close()
    return params, config, step


def export_average(
    workdir: str,
    out: str,
    *,
    sigma_rel: float,
    step: int | None = None,
    log: Callable[[str], None] = print,
) -> Config:
    """Writes a stage folder as `export` does, of the power-function average of a chosen width.

    Args:
      workdir: folder of a run with `config.ema.snapshot_every` set.
      out: stage folder to write.
      sigma_rel: relative width of the average, in (0, 0.28).
      step: updates after which the average ends; None: those of the last snapshot.
      log: receives one line, which says how well the snapshots could make up that average.

    Raises:
      ConfigError: `sigma_rel` is out of range.
      SnapshotError: there are no snapshots, they cannot be used, or `step` is beyond the last one.
      CheckpointError: `out` holds something else.
    """
    check_sigma_rel("--sigma_rel", sigma_rel)
    folder = stage_folder(out)
    snapshots, config = ema_snapshots.find(workdir)
    last = snapshots[-1].profile.step
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ema_snapshots.SnapshotError(
            f"--step={step} must be a step from 1 to {last}, the last snapshot of {workdir}"
        )
    # Those after the one that ends the average tell nothing more about it.
    end = min(s.profile.step for s in snapshots if s.profile.step >= step)
    snapshots = [s for s in snapshots if s.profile.step <= end]
    average = ema.reconstruct(snapshots, sigma_rel, step)
    label = (
        f"power-function average, sigma_rel {sigma_rel:g}, fitted within {average.error:.2%} "
        f"by {len(snapshots)} snapshots"
    )
    config = _write(folder, average.params, config, step, label)
    log(f"{folder}: step {step} of {workdir}, {label}")
    return config


def stage_folder(out: str) -> pathlib.Path:
    """The path of `out`. Raises CheckpointError when something else than a stage is there."""
    folder = pathlib.Path(out).absolute()
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not (folder / "params.safetensors").is_file():
        raise CheckpointError(f"--out={out} exists and is no stage folder; name a new one")
    return folder


def _write(folder: pathlib.Path, params: Any, config: Config, step: int, average: str) -> Config:
    """Writes the stage folder of a run; returns its configuration."""
    text_path = config.text.path and str(pathlib.Path(config.text.path).absolute())
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, path=text_path))
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    write_stage(folder, params, config, {"card.md": _card(config, step, count, average)})
    return config


def write_stage(
    folder: pathlib.Path, params: Any, config: Config, texts: Mapping[str, str]
) -> None:
    """Writes a stage folder under a temporary name and renames it; an older one is replaced.

    Args:
      folder: from `stage_folder`.
      params: plain parameters.
      config: the stage.
      texts: further files, name to content.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    flat = weights.flatten(jax.tree.map(np.asarray, params))
    weights.write_safetensors(temporary / "params.safetensors", flat)
    (temporary / "config.json").write_text(config_io.to_json(config))
    for name, text in texts.items():
        (temporary / name).write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _abstract_params(config: Config):
    boxed = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partitioning.unbox(boxed),
    )


def _card(config: Config, step: int, count: int, average: str) -> str:
    lowres = config.data.lowres_size
    return CARD.format(
        name=config.name,
        image_size=config.data.image_size,
        lowres=f" from {lowres}x{lowres}" if lowres else "",
        count=count,
        average=average,
        step=step,
        batch_size=config.data.batch_size,
        kind=config.data.kind,
        path=config.data.path,
        dataset=config.data.name if config.data.kind == "tfds" else "",
        encoder=config.text.encoder,
        encoder_path=config.text.path,
    )
