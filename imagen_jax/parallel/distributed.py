"""Runs of several processes: initialisation, process index, all-gather.

Every process runs the same program with the same configuration and reads its own part of each batch
(`data.batches.pipeline`); JAX forms global arrays of the parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Seconds that processes wait for each other at the start; machines of a pod boot minutes apart.
START_TIMEOUT = 300


class DistributedError(ValueError):
    """Inconsistent multi-process environment variables; the message names the variable."""


def initialize(log: Callable[[str], None] = print, *, heartbeat_timeout: int = 100) -> None:
    """Joins the other processes of the run, if any; call before JAX uses a device.

    The processes are given by the three `VARIABLES`, otherwise by `srun` or GKE, which
    `jax.distributed` reads (docs/clusters.md). Without any of these the run has one process.

    Args:
      log: called with one line before the process waits.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead, and
        JAX aborts the others (SIGABRT).

    Raises:
      DistributedError: some of the variables are missing or inconsistent.
    """
    arguments = _arguments(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    # Collectives between CPU processes need Gloo; other platforms ignore this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if arguments:
        process = f"process {arguments['process_id']} of {arguments['num_processes']}"
        log(f"{process}: waiting for the others at {arguments['coordinator_address']}")
    timeouts: dict[str, Any] = {"initialization_timeout": START_TIMEOUT}
    timeouts["heartbeat_timeout_seconds"] = heartbeat_timeout
    jax.distributed.initialize(**arguments, **timeouts)


def _arguments(environment: os._Environ[str] | dict[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize; {}: it reads them itself; None: one process."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given:
        return _explicit(given)
    # SLURM_STEP_*: inside srun. The script of a job has SLURM_NTASKS, too, but is one process.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {}
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return {} if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment else None


def _explicit(given: dict[str, str]) -> dict[str, Any]:
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise DistributedError(
            f"{missing[0]} is not set but {', '.join(given)} is; set all of {', '.join(VARIABLES)}"
        )
    address, count, index = (given[name] for name in VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise DistributedError(
            f"JAX_PROCESS_ID={index} must be a number from 0 to JAX_NUM_PROCESSES - 1, "
            f"JAX_NUM_PROCESSES={count}"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def is_planned() -> bool:
    """Whether the environment names several processes, which `initialize` joins."""
    return _arguments(os.environ) is not None


def is_joined() -> bool:
    """Whether this process has joined others in `initialize`; uses no device."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes the output of the run: log lines, metrics, images."""
    return jax.process_index() == 0


def index() -> int:
    """Index of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def all_gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, [processes, ...]; a barrier that all processes must call."""
    if count() == 1:
        return np.asarray(array)[None]
    return np.asarray(multihost_utils.process_allgather(array))


def share(text: str) -> list[str]:
    """The texts of all processes, in their order; a barrier that all processes must call."""
    if count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(all_gather(np.asarray(data.size)).max())
    # Few lengths: a gather is compiled for each.
    padded = np.zeros((longest // 4096 + 1) * 4096, np.uint8)
    padded[: data.size] = data
    return [row.tobytes().rstrip(b"\0").decode() for row in all_gather(padded)]
