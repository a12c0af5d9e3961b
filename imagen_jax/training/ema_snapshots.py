"""Snapshots of a run's power-function averages: `WORKDIR/ema/STEP/{power_0.050.safetensors, ...}`.

`ema.reconstruct` builds an average of any width from them after training. Each folder also holds
the run's configuration, whose `ema.profiles` gives the widths, so the snapshots are usable without
a checkpoint. A folder is written under a temporary name and renamed, so a listed one is complete.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.interop import weights
from imagen_jax.io import atomic
from imagen_jax.parallel import distributed, partitioning
from imagen_jax.stages.network import with_defaults
from imagen_jax.training import ema


class SnapshotError(ValueError):
    """Snapshots are missing or cannot be used; the message names the fix."""


def save(workdir: str, step: int, averages: Mapping[str, Any], config: Config) -> None:
    """Writes the power-function averages of `step`; returns when they are on disk.

    Every process must call it; the first one writes. Replaces a snapshot of the same step. Save it
    before the checkpoint of the step: a run resumed from that checkpoint does not write this
    snapshot again.

    Args:
      workdir: folder of the run.
      step: number of updates done.
      averages: averages of the state, by name.
      config: configuration of the run.
    """
    folder = _folder(workdir) / str(step)
    with atomic.folder(folder) if distributed.is_first() else contextlib.nullcontext() as temporary:
        if temporary:
            (temporary / "config.json").write_text(overrides.to_json(config))
        for name in map(ema.power_name, config.ema.profiles):
            arrays = jax.tree.map(partitioning.fetch, averages[name])
            if temporary:
                weights.write_safetensors(temporary / _file(name), weights.flatten(arrays))


def find(workdir: str) -> tuple[list[ema.Snapshot], Config]:
    """The snapshots of a run, by increasing step, and the configuration of the last one.

    Parameters are read when `Snapshot.load` is called, as a nested dict `{"a": {"b": array}}`.

    Raises:
      SnapshotError: no snapshots, an unreadable one, or one of another model than the last one.
    """
    folders = [f for f in _folder(workdir).glob("*") if f.name.isdecimal()]
    folders.sort(key=lambda folder: int(folder.name))
    if not folders:
        raise SnapshotError(
            f"--workdir={workdir} has no snapshots of averages; train with "
            "--config.ema.profiles=(0.05,0.1) --config.ema.snapshot_every=STEPS"
        )
    configs = [_read_config(folder) for folder in folders]
    snapshots = []
    for folder, config in zip(folders, configs, strict=True):
        if with_defaults(config).model != with_defaults(configs[-1]).model:
            raise SnapshotError(
                f"{folder} is a snapshot of another model than {folders[-1]}; move it away"
            )
        for sigma_rel in config.ema.profiles:
            path = folder / _file(ema.power_name(sigma_rel))
            profile = ema.Profile(sigma_rel, int(folder.name))
            snapshots.append(ema.Snapshot(profile, functools.partial(_load, path)))
    return snapshots, configs[-1]


def _folder(workdir: str) -> pathlib.Path:
    return pathlib.Path(workdir) / "ema"


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _read_config(folder: pathlib.Path) -> Config:
    try:
        return overrides.from_json((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SnapshotError(f"snapshot {folder} cannot be read ({error}); move it away") from error


def _load(path: pathlib.Path) -> Any:
    try:
        return weights.unflatten(weights.read_safetensors(path))
    except (OSError, weights.WeightsError) as error:
        raise SnapshotError(
            f"snapshot {path} cannot be read ({error}); move its folder away"
        ) from error
