"""A compiled train step as a file: made by `plan --save`, loaded by `train --compiled`.

The file is one line of JSON that says what the step was made for, then JAX's own serialisation. The
line is read first and must agree in every field; only then is the rest unpickled, and a file that
is not the user's own is refused, since unpickling and running it is running a program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

FORMAT = 1
# Sections and fields that are not part of the step.
OUTSIDE = (
    "name",
    "data.kind",
    "data.path",
    "data.name",
    "data.split",
    "data.image_key",
    "data.caption_key",
    "data.resize_filter",
    "data.min_size",
    "data.max_quarantined",
    "data.embeddings",
    "data.fingerprint",
    "data.loader",
    "data.prefetch",
    "text",
    "pretrain_text",
    "embed",
    "checkpoint",
    "sampling",
    "ema.snapshot_every",
    "mesh.cpu_devices",
    "train.overfit_batch",
    "train.nan_patience",
    "train.rollbacks",
    "train.profile_at",
    "train.log_every",
    "train.sample_every",
)


class CompiledError(ValueError):
    """A compiled step cannot be used; the message names file and field."""


def identity(config: Config, devices: list[jax.Device]) -> dict[str, Any]:  # pyright: ignore[reportInvalidTypeForm]
    """All that two compiled train steps must share to be the same program, field by field.

    Args:
      config: the stage.
      devices: in the order of the mesh; of a slice that is not here, or of this machine.
    """
    libraries = ["jax", "jaxlib", "flax", "optax"]
    if devices[0].platform == "tpu":
        libraries.append("libtpu")
    described = {
        "versions.imagen_jax": _source_hash(),
        **{f"versions.{name}": importlib.metadata.version(name) for name in libraries},
        "topology.device_kind": devices[0].device_kind,
        "topology.devices": len(devices),
        "topology.processes": len({d.process_index for d in devices}),
        "topology.shape": _shape(devices),
    }
    fields = overrides.flat(dataclasses.asdict(config))
    return described | {
        f"config.{path}": value
        for path, value in fields.items()
        if not overrides.matches_any_field(path, OUTSIDE)
    }


def _source_hash() -> str:
    """Of this package's code: a step compiled from other code may be another step."""
    digest = hashlib.sha256()
    folder = pathlib.Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _shape(devices: list[jax.Device]) -> str:  # pyright: ignore[reportInvalidTypeForm]
    """Sides of a TPU slice, such as 4x8x8; else empty."""
    places = [getattr(device, "coords", None) for device in devices]
    if None in places:
        return ""
    return "x".join(str(max(side) - min(side) + 1) for side in zip(*places, strict=True))


def save(path: str, compiled: jax.stages.Compiled, step_identity: Mapping[str, Any]) -> int:
    """Writes a compiled step; returns the file's size in bytes.

    Args:
      path: file to write, readable and writable by its owner alone.
      compiled: the executable.
      step_identity: of `identity`.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    head = {"format": FORMAT, "sha256": hashlib.sha256(payload).hexdigest(), **step_identity}
    temporary = f"{path}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + payload)
    os.replace(temporary, path)
    return os.path.getsize(path)


def load(
    path: str, traced: jax.stages.Traced, step_identity: Mapping[str, Any]
) -> jax.stages.Compiled:
    """Reads a compiled step.

    Args:
      path: file of `save`.
      traced: the step, traced here: what goes in and comes out.
      step_identity: `identity` of what is to run here.

    Raises:
      CompiledError: the file is damaged, not the user's own, or of another step; names the field.
    """
    try:
        with open(path, "rb") as file:
            owner = os.fstat(file.fileno())
            head, payload = file.readline(), file.read()
    except OSError as error:
        raise CompiledError(f"--compiled={path}: {error.strerror}") from error
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise CompiledError(
            f"--compiled={path} belongs to another user or others may write to it, and loading it "
            "runs what is in it; make your own with `imagen plan --save=FILE`"
        )
    try:
        found = dict(json.loads(head))
    except (ValueError, TypeError) as error:
        raise CompiledError(f"--compiled={path} is no file of `imagen plan --save`") from error
    if found.pop("format", None) != FORMAT:
        raise CompiledError(f"--compiled={path} has another format; make it again with `plan`")
    digest = found.pop("sha256", None)
    # As JSON has it: tuples are lists there.
    wanted = json.loads(json.dumps(dict(step_identity)))
    for field in sorted(found.keys() | wanted.keys(), key=_order):
        if found.get(field) != wanted.get(field):
            raise CompiledError(
                f"--compiled={path} was made for {field}={found.get(field)!r}, here it is "
                f"{wanted.get(field)!r}; make it again with `imagen plan --save={path}`"
            )
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CompiledError(f"--compiled={path} is damaged; make it again with `plan`")
    return serialize_executable.deserialize_and_load(payload, traced.in_tree, traced.out_tree)


def _order(field: str) -> tuple[bool, str]:
    """What the user can change comes first: the configuration, then devices and versions."""
    return not field.startswith("config."), field
