"""One run over many processes: joining them, and what only the first of them does.

Every process runs the same program on the same configuration and reads its own part of each batch
(`data.pipeline`); JAX makes one array of the parts.
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
PATIENCE = 300


class DistributedError(ValueError):
    """The environment does not say clearly who takes part; the message names the variable."""


def initialize(log: Callable[[str], None] = print) -> None:
    """Joins the other processes of the run, if there are any; call before JAX touches a device.

    Who takes part is said by the three `VARIABLES` (`launch/local_processes.sh` sets them), or else
    by SLURM, GKE or the TPU pod in their own way, which `jax.distributed` reads. Where none of
    them speaks, the process is on its own.

    Raises:
      DistributedError: some of the variables are missing or are not numbers that fit.
    """
    arguments = _arguments(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    # Gloo lets CPU processes talk; other platforms have their own network and ignore this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if arguments:
        who = f"process {arguments['process_id']} of {arguments['num_processes']}"
        log(f"{who}: waiting for the others at {arguments['coordinator_address']}")
    jax.distributed.initialize(**arguments, initialization_timeout=PATIENCE)


def _arguments(environment: os._Environ[str] | dict[str, str]) -> dict[str, Any] | None:
    """What to give to jax.distributed.initialize; {}: it finds out itself; None: a lone process."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given:
        return _explicit(given)
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return {}
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return {} if pod or "MEGASCALE_COORDINATOR_ADDRESS" in environment else None


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


def is_first() -> bool:
    """Whether this process writes what all of them know: lines, metrics, pictures."""
    return jax.process_index() == 0


def index() -> int:
    """Which of the processes this one is, from 0."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, [processes, ...]; waits for them. All must ask."""
    if count() == 1:
        return np.asarray(array)[None]
    return np.asarray(multihost_utils.process_allgather(array))
