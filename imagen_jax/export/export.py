"""From a training run to a stage folder (`imagen_jax.stages.folder`).

`export` takes the moving average of a checkpoint; `export_average` combines the run's snapshots
into a power-function average of any width. `stablehlo` and `convert` write other formats. Every
export samples with what it wrote (`check`) before the folder appears.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config, check_sigma_rel
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.export.check import check
from imagen_jax.inference import placement
from imagen_jax.interop import hf_bert
from imagen_jax.io import atomic
from imagen_jax.parallel import memory, partitioning
from imagen_jax.stages import model_card, network
from imagen_jax.stages.folder import (
    CARD_FILE,
    StageError,
    check_stage_output,
    copy_encoder,
    has_params,
    load_stage,
    write_stage_files,
)
from imagen_jax.stages.lora import merged_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import TEXT_ENCODERS
from imagen_jax.training import ema, ema_snapshots
from imagen_jax.training.checkpoint import Checkpoints, newest
from imagen_jax.training.restore import CheckpointError


def export(
    workdir: str,
    out: str,
    *,
    step: int = 0,
    licence: str = "",
    scores: str = "",
    text_encoder: str = "",
    log: Callable[[str], None] = print,
) -> Config:
    """Writes a stage folder from a checkpoint; replaces an older stage folder.

    Args:
      workdir: folder of the run.
      out: stage folder to write, atomically.
      step: step of the checkpoint; 0: the newest one.
      licence: for the card.
      scores: evaluations for the card, Markdown.
      text_encoder: folder of the text encoder, if it has moved; "": `config.text.path` of the run.
      log: receives the lines.

    Returns:
      The configuration that was written.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      StageError: the text encoder is not where the run has it.
      OutputError: `out` exists and is not a stage folder.
      ExportError: the written stage samples other images than the checkpoint.
    """
    folder = check_stage_output(out)
    params, config, step = read_average(workdir, step)
    config = _with_encoder(config, text_encoder)
    card = {
        "step": step,
        "average": "exponential moving average",
        "metrics": model_card.last_metrics(workdir, step),
        "licence": licence,
        "scores": scores,
    }
    config = _write(folder, merged_stage(Stage(config, params)), card, log)
    log(f"{folder}: step {step} of {workdir}")
    return config


def read_source(source: str) -> Stage:
    """Reads a stage from a stage folder, or from the newest checkpoint of a run; a LoRA is merged.

    Raises:
      StageError, CheckpointError: neither can be read.
    """
    if has_params(pathlib.Path(source)):
        return load_stage(source)
    params, config, _ = read_average(source)
    return merged_stage(Stage(config, params))


def read_average(workdir: str, step: int = 0) -> tuple[Any, Config, int]:
    """Reads the moving average, the configuration and the step of a run's checkpoint.

    Args:
      workdir: folder of the run.
      step: step of the checkpoint; 0: the newest one.

    Raises:
      CheckpointError: there is no checkpoint, none of that step, or it cannot be read.
    """
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(f"--workdir={workdir} holds no checkpoints; train first")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    shapes: dict[str, Any] = {}  # They take longer than a run may need for its next save.

    def choose(steps: list[int]) -> int | None:
        if steps and step and step not in steps:
            found = ", ".join(map(str, steps))
            raise CheckpointError(
                f"--step={step} is no checkpoint of {workdir}, which has {found}; "
                "config.checkpoint.keep_every keeps more"
            )
        return step or newest(steps)

    def read(chosen: int) -> tuple[Any, Config, int]:
        config = checkpoints.restore_config(chosen)
        described = overrides.to_json(config)
        if described not in shapes:
            shapes[described] = _abstract_params(config)
        return checkpoints.restore_ema(chosen, shapes[described]), config, chosen

    found = checkpoints.read(choose, read)
    if found is None:
        raise CheckpointError(f"--workdir={workdir} holds no complete checkpoint; train first")
    return found


def export_average(
    workdir: str,
    out: str,
    *,
    sigma_rel: float,
    step: int | None = None,
    text_encoder: str = "",
    log: Callable[[str], None] = print,
) -> Config:
    """Writes a stage folder with a power-function average of a given width.

    Args:
      workdir: folder of a run with `config.ema.snapshot_every` set.
      out: stage folder to write, atomically.
      sigma_rel: relative width of the average, in (0, 0.28).
      step: step at which the average ends; None: the last snapshot's.
      text_encoder: as of `export`.
      log: receives the lines; the last one has the relative error of the fitted average.

    Returns:
      The configuration that was written.

    Raises:
      ConfigError: `sigma_rel` is out of range.
      SnapshotError: there are no snapshots, they cannot be used, or `step` is beyond the last one.
      StageError: the text encoder is not where the run has it.
      OutputError: `out` exists and is not a stage folder.
    """
    check_sigma_rel("--sigma_rel", sigma_rel)
    folder = check_stage_output(out)
    snapshots, config = ema_snapshots.find(workdir)
    config = _with_encoder(config, text_encoder)
    last = snapshots[-1].profile.step
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ema_snapshots.SnapshotError(
            f"--step={step} must be a step from 1 to {last}, the last snapshot of {workdir}"
        )
    # Snapshots after the first one at or beyond `step` are not used.
    end = min(s.profile.step for s in snapshots if s.profile.step >= step)
    snapshots = [s for s in snapshots if s.profile.step <= end]
    average = ema.reconstruct(snapshots, sigma_rel, step)
    label = (
        f"power-function average, sigma_rel {sigma_rel:g}, fitted within {average.error:.2%} "
        f"by {len(snapshots)} snapshots"
    )
    card = {"step": step, "average": label}
    config = _write(folder, merged_stage(Stage(config, average.params)), card, log)
    log(f"{folder}: step {step} of {workdir}, {label}")
    return config


def _write(
    folder: pathlib.Path, stage: Stage, card: Mapping[str, Any], log: Callable[[str], None]
) -> Config:
    """Writes the stage folder of a run and samples with it; returns the written configuration.

    Args:
      folder: from `check_stage_output`.
      stage: plain parameters, configuration of the run.
      card: arguments of `model_card.format_card`.
      log: receives a line.
    """
    config, params = stage
    config = dataclasses.replace(config, data=config.data.uncropped())
    with atomic.folder(folder) as temporary:
        copied = dataclasses.replace(config, text=copy_encoder(config.text, temporary))
        texts = {CARD_FILE: model_card.format_card(copied, params=params, **card)}
        write_stage_files(temporary, params, config, texts)
        check(Stage(config, params), load_stage(str(temporary)), "stage folder", log)
    if not copied.text.path:
        log(f"{folder}: without a text encoder (config.text.path is empty); sample needs one")
    elif copied.text.path == config.text.path:
        log(f"{folder}: the text encoder stays in {config.text.path}; sample reads it there")
    return config


def _with_encoder(config: Config, text_encoder: str = "") -> Config:
    """The configuration with the absolute path of its text encoder.

    Raises:
      StageError: there is no such folder.
    """
    path = text_encoder or config.text.path
    found = pathlib.Path(path)
    # An address, an installed encoder and one of a plug-in are no folder.
    elsewhere = (
        "://" in path or path in hf_bert.PACKAGES or config.text.encoder not in TEXT_ENCODERS
    )
    if path and not found.is_dir() and (text_encoder or not elsewhere):
        raise StageError(
            f"the text encoder {path!r} is no folder here ({pathlib.Path.cwd()}); run the command "
            "where the run was started, or give --text_encoder=DIR"
        )
    if path and found.is_dir():
        path = str(found.absolute())
    return dataclasses.replace(config, text=dataclasses.replace(config.text, path=path))


def _abstract_params(config: Config) -> Any:
    """Shapes of the parameters, on one device, or sharded over those of this process."""
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(network.boxed_shapes(config)))  # float32
    fsdp = placement.choose_fsdp(size, [size], "one", memory.local_devices())
    devices = jax.local_devices() if fsdp > 1 else jax.local_devices()[:1]
    mesh = partitioning.sampling_mesh(devices, fsdp=fsdp, height=1)
    return network.abstract_params(config, mesh)
