"""Snapshots of a run's power-function averages: `WORKDIR/ema/STEP/{averages, config}`.

`ema.reconstruct` builds an average of any width from them after training. `averages` holds the
averages by name, sharded, as Orbax writes them; `config` is the run's configuration, whose
`ema.profiles` gives the widths, so the snapshots are usable without a checkpoint. A folder is
written under a temporary name and renamed, so a listed one is complete. Earlier commits wrote
`power_0.050.safetensors` and `config.json`; these are read, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.interop import weights
from imagen_jax.io import buckets, mirrors
from imagen_jax.stages.network import with_defaults
from imagen_jax.training import bucket_arrays, checkpoint, ema, restore, saved_trees


class SnapshotError(ValueError):
    """Snapshots are missing or cannot be used; the message names the fix."""


def save(workdir: str, step: int, averages: Mapping[str, Any], config: Config) -> None:
    """Writes the power-function averages of `step`; returns when they are on disk.

    Every process must call it and writes its shards. Replaces a snapshot of the same step. Save it
    before the checkpoint of the step: a run resumed from that checkpoint does not write this
    snapshot again.

    Args:
      workdir: folder of the run.
      step: number of updates done.
      averages: averages of the state, by name.
      config: configuration of the run.
    """
    chosen = {name: averages[name] for name in map(ema.power_name, config.ema.profiles)}
    saved_trees.save_tree(_folder(workdir) / str(step), "averages", chosen, config)


def find(workdir: str) -> tuple[list[ema.Snapshot], Config]:
    """The snapshots of a run, by increasing step, and the configuration of the last one.

    Parameters are read when `Snapshot.load` is called, as a nested dict `{"a": {"b": array}}`.

    Raises:
      SnapshotError: no snapshots, an unreadable one, or one of another model than the last one.
    """
    folders = [f for f in _listed(workdir) if f.name.isdecimal()]
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
            load = functools.partial(_load, folder, ema.power_name(sigma_rel))
            snapshots.append(ema.Snapshot(ema.Profile(sigma_rel, int(folder.name)), load))
    return snapshots, configs[-1]


def _folder(workdir: str) -> epath.Path:
    return checkpoint.absolute(workdir) / "ema"


def _listed(workdir: str) -> list[epath.Path]:
    folder = _folder(workdir)
    if address := mirrors.origin(folder):
        names = buckets.names(address)
        return [folder / name.split("/")[0] for name in names if name.endswith("/saved.json")]
    return list(folder.iterdir()) if folder.is_dir() else []


def _read_config(folder: epath.Path) -> Config:
    old = folder / "config.json"
    try:
        if address := mirrors.origin(folder / "averages"):
            found = bucket_arrays.read_commit(address)["config"]
            return overrides.from_json(json.dumps(found))
        text = (old if old.exists() else folder / "config" / "metadata").read_text()
        return overrides.from_json(text)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"snapshot {folder} cannot be read ({error}); move it away") from error


def _load(folder: epath.Path, name: str) -> Any:
    try:
        if mirrors.origin(folder) or (folder / "averages").exists():
            return restore.read_on_host(folder / "averages", name)
        return weights.unflatten(weights.read_safetensors(str(folder / f"{name}.safetensors")))
    except (OSError, weights.WeightsError, restore.CheckpointError) as error:
        raise SnapshotError(
            f"snapshot {folder} cannot be read ({error}); move its folder away"
        ) from error
