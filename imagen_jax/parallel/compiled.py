"""A compiled train step as a file: written by `plan --save`, loaded by `train --compiled`.

The file is one line of JSON, the identity of the step, followed by JAX's serialisation. The rest is
unpickled only if the identity agrees in every field. A file that another user owns or can write to
is rejected, because unpickling executes code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import imagen_jax
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.io import atomic

FORMAT = 1


class CompiledError(ValueError):
    """A compiled step cannot be loaded; the message names file and field."""


def identity(config: Config, devices: list[jax.Device]) -> dict[str, Any]:  # pyright: ignore[reportInvalidTypeForm]
    """Fields that are equal for two compiled train steps exactly if they are the same program.

    Args:
      config: the stage.
      devices: in the order of the mesh, of a `topology.Slice`.
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
    fields = overrides.flatten_fields(dataclasses.asdict(config))
    return described | {
        f"config.{path}": value
        for path, value in fields.items()
        if not overrides.matches_any_field(path, overrides.NOT_COMPILED_FIELDS)
    }


def _source_hash() -> str:
    """Hash of the code of imagen_jax."""
    digest = hashlib.sha256()
    folder = pathlib.Path(imagen_jax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _shape(devices: list[jax.Device]) -> str:  # pyright: ignore[reportInvalidTypeForm]
    """Sides of a TPU slice, such as 4x8x8; "" for other devices."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if None in coordinates:
        return ""
    return "x".join(str(max(side) - min(side) + 1) for side in zip(*coordinates, strict=True))


def save(path: str, compiled: jax.stages.Compiled, step_identity: Mapping[str, Any]) -> int:
    """Writes a compiled step; returns the file's size in bytes.

    Args:
      path: file to write, readable and writable only by its owner.
      compiled: the executable.
      step_identity: result of `identity`.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    head = {"format": FORMAT, "sha256": hashlib.sha256(payload).hexdigest(), **step_identity}
    with atomic.file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + payload)
    return os.path.getsize(path)


def load(
    path: str, traced: jax.stages.Traced, step_identity: Mapping[str, Any]
) -> jax.stages.Compiled:
    """Reads a compiled step.

    Args:
      path: file of `save`.
      traced: the step, traced in this process, for the structure of inputs and outputs.
      step_identity: `identity` of the step of this run.

    Raises:
      CompiledError: the file is damaged, of another user, or of another step; names the field.
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
            "executes its content; write your own with `imagen plan --save=FILE`"
        )
    try:
        found = dict(json.loads(head))
    except (ValueError, TypeError) as error:
        raise CompiledError(f"--compiled={path} is not a file of `imagen plan --save`") from error
    if found.pop("format", None) != FORMAT:
        raise CompiledError(f"--compiled={path} has another format; write it again with `plan`")
    digest = found.pop("sha256", None)
    expected = json.loads(json.dumps(dict(step_identity)))  # In JSON, tuples are lists.
    for field in sorted(found.keys() | expected.keys(), key=_order):
        if found.get(field) != expected.get(field):
            raise CompiledError(
                f"--compiled={path} was compiled for {field}={found.get(field)!r}, here it is "
                f"{expected.get(field)!r}; write it again with `imagen plan --save={path}`"
            )
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CompiledError(f"--compiled={path} is damaged; write it again with `plan`")
    return serialize_executable.deserialize_and_load(payload, traced.in_tree, traced.out_tree)


def _order(field: str) -> tuple[bool, str]:
    """Sort key: fields of the configuration first, then devices and versions."""
    return not field.startswith("config."), field


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compilation without JAX's cache: on CPU, programs from the cache cannot be serialised."""
    used = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(used)


def _use_cache(setting: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", setting)
    compilation_cache.reset_cache()  # JAX reads the setting once.
