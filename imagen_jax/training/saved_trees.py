"""Trees of arrays that are saved once, beside the checkpoints: snapshots of averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from imagen_jax.config.schema import Config
from imagen_jax.io import mirrors
from imagen_jax.training import bucket_checkpoints


def save_tree(folder: epath.Path, name: str, tree: Mapping[str, Any], config: Config) -> None:
    """Writes FOLDER/{NAME, config} and waits; every process must call it and writes its shards.

    Replaces the folder. The name appears when all is written.
    """
    if address := mirrors.origin(folder):
        bucket_checkpoints.save_tree(address, name, tree, config)
        return
    handler = ocp.CompositeCheckpointHandler(
        **{name: ocp.PyTreeCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    )
    items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree)}
    items["config"] = ocp.args.JsonSave(dataclasses.asdict(config))
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=ocp.args.Composite(**items), force=True)
