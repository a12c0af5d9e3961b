"""Reading of saved arrays in one or several processes: what fails, who reads, who agrees.

A read is repeated with back-off. Then the processes exchange how it ended, so that all go
on, or all raise the same error. Where the parameters are replicated over processes, one replica
reads and the devices' network carries the rest (`parallel.replicas`). Reading changes no file.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from imagen_jax.io import mirrors
from imagen_jax.io.buckets import BucketError, MissingError
from imagen_jax.parallel import distributed, replicas
from imagen_jax.training import bucket_arrays
from imagen_jax.training.state import TrainState

T = TypeVar("T")

# Seconds before the second try; doubled before each further one.
BACK_OFF = 0.5


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its folder and the fix."""


class ModelMismatchError(CheckpointError):
    """The parameters of a checkpoint do not match the configured model."""


class MemoryExhaustedError(CheckpointError):
    """The state does not fit into the memory of the devices or the host."""


class UnreachableError(CheckpointError):
    """The file system failed, on one machine or for some time; the checkpoint may be whole."""


class DamagedError(CheckpointError):
    """The content of a checkpoint is damaged."""


# The first one that any process meets decides for all. Number of tries of each.
_TRIES: dict[type[CheckpointError], int] = {
    ModelMismatchError: 1,
    MemoryExhaustedError: 1,
    UnreachableError: 6,
    DamagedError: 2,
}
_BY_NAME = {kind.__name__: kind for kind in _TRIES}

# Errors of files and networks that say nothing about the content.
_NUMBERS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOTCONN),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH),
    *(errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
}
# Status codes of tensorstore and HTTP.
_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED)\b"
    r"|\bHTTP (response )?(code: )?(408|429|5\d\d)\b",
    re.IGNORECASE,
)
_OS_ERROR = re.compile(r"OS error (\d+)")
_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def kind_of(error: BaseException) -> type[CheckpointError]:
    """What a failed read says about the checkpoint; Orbax and tensorstore raise many types."""
    if isinstance(error, CheckpointError):
        return type(error)
    error = _origin(error)
    text = str(error)
    if isinstance(error, BucketError) and not isinstance(error, MissingError):
        return UnreachableError
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return MemoryExhaustedError
    numbers = {int(number) for number in _OS_ERROR.findall(text)}
    if isinstance(error, OSError) and error.errno is not None:
        numbers.add(error.errno)
    if numbers & _NUMBERS or isinstance(error, TimeoutError) or _STATUS.search(text):
        return UnreachableError
    return DamagedError


def _origin(error: BaseException) -> BaseException:
    """The first error of a chain; Orbax raises its own, without the reason, from tensorstore's."""
    while error.__cause__ is not None and not isinstance(error, BucketError):
        error = error.__cause__
    return error


def attempt(what: str, action: Callable[[], T]) -> T:
    """Calls `action`, again after errors that may pass.

    Args:
      what: for the message, such as "checkpoint WORKDIR/checkpoints/100".
      action: reads something; may raise anything.

    Raises:
      CheckpointError: of the kind of the last error; the message says how often it was tried.
    """
    delay, tried = BACK_OFF, 0
    while True:
        tried += 1
        try:
            return action()
        except Exception as error:
            kind = kind_of(error)
            if isinstance(error, CheckpointError) and kind not in (UnreachableError, DamagedError):
                raise
            reason = f"{type(_origin(error)).__name__}: {in_short(_origin(error))}"
            if tried >= _TRIES[kind]:
                raise kind(f"{what} cannot be read ({reason}){_advice(kind, tried)}") from error
        warnings.warn(f"{what}: {reason}; trying again in {delay:g} s", stacklevel=2)
        time.sleep(delay)
        delay *= 2


def _advice(kind: type[CheckpointError], tried: int) -> str:
    if kind is MemoryExhaustedError:
        return "; the state does not fit into memory: use more devices, or raise config.mesh.fsdp"
    if kind is UnreachableError:
        return f" in {tried} tries; nothing was changed: repair the file system, then restart"
    return ""


def together(action: Callable[[], T] | None) -> T | None:
    """Runs `action` in the processes that give one; raises the same error in all, or in none.

    Every process must call it. The kind of error that decides is the first of `_TRIES`.

    Args:
      action: raises nothing but CheckpointError; None: this process waits for the others.
    """
    result, failure = None, []
    try:
        result = action() if action else None
    except CheckpointError as error:
        failure = [type(error).__name__, str(error)]
    ended = [json.loads(text) for text in distributed.share(json.dumps(failure))]
    for name, kind in _BY_NAME.items():
        for process, found in enumerate(ended):
            if found and found[0] == name:
                where = f" [process {process}]" if len(ended) > 1 else ""
                raise kind(found[1] + where)
    for found in filter(None, ended):
        raise CheckpointError(found[1])
    return result


def from_first(action: Callable[[], str]) -> str:
    """The text that `action` returns in the first process, in all; as `together`."""
    text = together(action if distributed.is_first() else None)
    return distributed.share(text or "")[0]


def read_arrays(folder: epath.Path, abstract: Any, *, partial: bool = False) -> Any:
    """Reads a tree of arrays; every process must call it.

    Args:
      folder: the item of a checkpoint.
      abstract: shapes with shardings.
      partial: `abstract` is a part of what is saved.

    Raises:
      CheckpointError: the same in all processes.
    """
    leaves, structure = jax.tree.flatten(abstract)
    mesh = _replicas(leaves)
    if mesh is None:
        return together(lambda: attempt(_name(folder), lambda: _read(folder, abstract, partial)))
    source = [_with_sharding(x, replicas.source_sharding(x.sharding, mesh)) for x in leaves]
    one = jax.tree.unflatten(structure, source)
    read = None
    if replicas.is_source(mesh):
        read = lambda: attempt(_name(folder), lambda: _read(folder, one, partial))  # noqa: E731
    tree = together(read)
    arrays = None if tree is None else jax.tree.leaves(tree)
    del tree
    return jax.tree.unflatten(structure, replicas.copy_to_all(arrays, leaves, mesh))


def check_model(saved: Any, abstract: TrainState, folder: epath.Path) -> None:
    """Raises ModelMismatchError naming every parameter that differs from `abstract`.

    Args:
      saved: shapes, from `tree_of`.
      abstract: shapes of the state.
      folder: of the state, for the message.
    """
    found, expected = (
        {jax.tree_util.keystr(k): tuple(v.shape) for k, v in jax.tree.leaves_with_path(tree)}
        for tree in (saved["params"], abstract.params)
    )
    new_averages = abstract.ema.keys() - saved["ema"].keys()
    if new_averages:
        raise ModelMismatchError(
            f"checkpoint {folder.parent} has no average {sorted(new_averages)[0]!r}; "
            "config.ema.profiles must be set when a run begins"
        )
    problems = [f"missing {k}" for k in expected.keys() - found.keys()]
    problems += [f"unexpected {k}" for k in found.keys() - expected.keys()]
    problems += [
        f"{k} has shape {found[k]}, the model expects {expected[k]}"
        for k in expected.keys() & found.keys()
        if found[k] != expected[k]
    ]
    if problems:
        raise ModelMismatchError(
            f"checkpoint {folder.parent} is of another model: " + "; ".join(sorted(problems))
        )


def read_on_host(folder: epath.Path, name: str = "") -> Any:
    """Reads a tree as NumPy arrays, in this process alone; `name`: only this part of it."""

    def read() -> Any:
        saved = tree_of(folder)
        item = {name: saved[name]} if name else saved
        if address := _address(folder):
            tree = bucket_arrays.read(address, item)
            return tree[name] if name else tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restore = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=bool(name))
        tree = ocp.PyTreeCheckpointHandler().restore(folder, args=restore)
        return tree[name] if name else tree

    return attempt(_name(folder), read)


def tree_of(folder: epath.Path) -> Any:
    """Shapes of the arrays of a saved tree. May raise anything."""
    if address := _address(folder):
        return bucket_arrays.shapes(bucket_arrays.read_commit(address)["tree"])
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def _address(folder: epath.Path) -> str | None:
    """Where the arrays are in a bucket: of a checkpoint's state, `checkpoints/STEP`."""
    address = mirrors.origin(folder)
    return address.removesuffix("/state") if address else None


def _read(folder: epath.Path, abstract: Any, partial: bool) -> Any:
    if address := _address(folder):
        return jax.block_until_ready(bucket_arrays.read(address, abstract))
    # The handler alone: a Checkpointer would wait for the other processes, which may have failed.
    args = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gb_in_flight(abstract))
    return jax.block_until_ready(handler.restore(folder, args=args))


def _gb_in_flight(abstract: Any) -> int:
    """GB that Orbax reads at a time, which it holds beside the arrays: 1, or the largest array."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    return 1 + max(sizes, default=0) // 10**9


def _replicas(leaves: list[Any]) -> jax.sharding.Mesh | None:
    """The mesh of replicas, if the arrays are sharded over several that are worth one read."""
    if distributed.count() == 1 or not isinstance(leaves[0].sharding, NamedSharding):
        return None
    placed = leaves[0].sharding.mesh
    devices = np.asarray(placed.devices)
    mesh = replicas.replica_mesh(jax.sharding.Mesh(devices, placed.axis_names))
    return mesh if mesh.shape["replica"] > 1 else None


def _with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _name(folder: epath.Path) -> str:
    """The checkpoint of an item, and the machine where several read."""
    host = f" on {socket.gethostname()}" if distributed.count() > 1 else ""
    return f"checkpoint {folder.parent}{host}"


def in_short(error: BaseException) -> str:
    """An error as one line; tensorstore's start with the file and end with the reason."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"
