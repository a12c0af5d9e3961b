"""From a training run to a stage folder: averaged parameters, configuration and a model card.

The parameters are the ordinary average of a checkpoint (`export`), or a power-function
average of any width, put together from the run's snapshots (`export_average`). A small text encoder
comes along. `stablehlo` and `convert` write other forms; each is drawn with before it appears
(`export_check`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax.config import overrides
from imagen_jax.config.schema import CheckpointConfig, Config, TextConfig, check_sigma_rel
from imagen_jax.export.check import check
from imagen_jax.interop import weights
from imagen_jax.io import atomic
from imagen_jax.parallel import partitioning
from imagen_jax.stages import model_card, stage
from imagen_jax.stages.folder import ENCODER_FOLDER, Stage, load_stage
from imagen_jax.training import ema, ema_snapshots
from imagen_jax.training.checkpoint import CheckpointError, Checkpoints

# A larger text encoder stays where it is; its vocabulary and fingerprint come along.
MAX_COPIED_ENCODER_BYTES = 64 * 2**20
VOCABULARY_FILES = ("spiece.model", "vocab.json", "merges.txt", "tokenizer.json")
ENCODER_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", *VOCABULARY_FILES)


def export(
    workdir: str,
    out: str,
    *,
    step: int = 0,
    licence: str = "",
    scores: str = "",
    log: Callable[[str], None] = print,
) -> Config:
    """Writes `OUT/{config.json, params.safetensors, card.md, text/}` from a checkpoint.

    The folder appears whole or not at all; an older one of the same name is replaced.

    Args:
      workdir: folder of the run.
      out: stage folder to write.
      step: of the checkpoint; 0: the newest one.
      licence: for the card.
      scores: evaluations for the card, Markdown.
      log: receives the lines.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      OutputError: `out` holds something else.
      ExportError: what was written draws something else.
    """
    folder = stage_folder(out)
    params, config, step = read_average(workdir, step)
    about = {
        "step": step,
        "average": "exponential moving average",
        "metrics": model_card.last_metrics(workdir, step),
        "licence": licence,
        "scores": scores,
    }
    config = _write(folder, params, config, about, log)
    log(f"{folder}: step {step} of {workdir}")
    return config


def read_source(source: str) -> Stage:
    """A stage from a stage folder, or from the newest checkpoint of a run.

    Raises:
      StageError, CheckpointError: neither can be read.
    """
    if (pathlib.Path(source) / "params.safetensors").is_file():
        return load_stage(source)
    params, config, _ = read_average(source)
    return Stage(config, params)


def read_average(workdir: str, step: int = 0) -> tuple[Any, Config, int]:
    """Averaged parameters, configuration and step of a run's checkpoint.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; 0: the newest one.

    Raises:
      CheckpointError: there is no checkpoint, none of that step, or it cannot be read.
    """
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(f"--workdir={workdir} holds no checkpoints; train first")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"--workdir={workdir} holds no complete checkpoint; train first")
    step = step or steps[-1]
    if step not in steps:
        found = ", ".join(map(str, steps))
        raise CheckpointError(
            f"--step={step} is no checkpoint of {workdir}, which has {found}; "
            "config.checkpoint.keep_every keeps more"
        )
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
      OutputError: `out` holds something else.
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
    about = {"step": step, "average": label}
    config = _write(folder, average.params, config, about, log)
    log(f"{folder}: step {step} of {workdir}, {label}")
    return config


def stage_folder(out: str) -> pathlib.Path:
    """The path of `out`. Raises OutputError when something else than a stage is there."""
    return atomic.check_replaceable(out, "params.safetensors", "stage folder")


def _write(
    folder: pathlib.Path,
    params: Any,
    config: Config,
    about: Mapping[str, Any],
    log: Callable[[str], None],
) -> Config:
    """Writes the stage folder of a run and draws with it; returns its configuration.

    Args:
      folder: from `stage_folder`.
      params: plain parameters.
      config: of the run.
      about: for `model_card.format_card`.
      log: receives a line.
    """
    text_path = config.text.path and str(pathlib.Path(config.text.path).absolute())
    text = dataclasses.replace(config.text, path=text_path)
    config = dataclasses.replace(config, text=text, data=config.data.whole())
    with atomic.folder(folder) as temporary:
        carried = dataclasses.replace(config, text=copy_encoder(text, temporary))
        card = model_card.format_card(carried, params=params, **about)
        _fill(temporary, params, config, {"card.md": card})
        check(Stage(config, params), load_stage(str(temporary)), "stage folder", log)
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
    with atomic.folder(folder) as temporary:
        _fill(temporary, params, config, texts)


def _fill(folder: pathlib.Path, params: Any, config: Config, texts: Mapping[str, str]) -> None:
    flat = weights.flatten(jax.tree.map(np.asarray, params))
    weights.write_safetensors(folder / "params.safetensors", flat)
    (folder / "config.json").write_text(overrides.to_json(config))
    for name, text in texts.items():
        (folder / name).write_text(text)


def encoder_files(text: TextConfig) -> dict[str, pathlib.Path]:
    """The files of a text encoder to copy, by name: of a large one the vocabulary alone.

    None where the encoder is not a folder on this machine.
    """
    source = pathlib.Path(text.path)
    if not text.path or not source.is_dir():
        return {}
    files = {name: source / name for name in ENCODER_FILES if (source / name).is_file()}
    if text.vocabulary:
        files["spiece.model"] = pathlib.Path(text.vocabulary)
    complete = {"config.json"} < files.keys() - set(VOCABULARY_FILES)
    size = sum(file.stat().st_size for file in files.values())
    if complete and size <= MAX_COPIED_ENCODER_BYTES:
        return files
    return {name: file for name, file in files.items() if name in VOCABULARY_FILES}


def copy_encoder(text: TextConfig, folder: pathlib.Path) -> TextConfig:
    """Copies `encoder_files` into a stage folder; returns where a reader of the folder finds it."""
    files = encoder_files(text)
    if files:
        (folder / ENCODER_FOLDER).mkdir()
    for name, file in files.items():
        shutil.copyfile(file, folder / ENCODER_FOLDER / name)
    path = f"{ENCODER_FOLDER}/" if "config.json" in files else text.path
    return dataclasses.replace(text, path=path)


def _abstract_params(config: Config):
    boxed = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partitioning.unbox(boxed),
    )
