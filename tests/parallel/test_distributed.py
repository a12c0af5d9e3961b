"""Every kind of cluster that docs/clusters.md lists is recognised by its variables.

JAX's own detection completes the arguments that `initialize` leaves to it.
"""

import os
import socket

import jax
import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.cluster import ClusterEnv

from imagen_jax.parallel import distributed
from imagen_jax.parallel.distributed import DistributedError

# What srun sets in the tasks of a step; process 5 of 8 is the second one of the second machine.
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
# The batch script of a job with 8 tasks, before any srun.
SBATCH = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
GKE_TPU = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "base-0-0.base,base-0-1.base",
}
MEGASCALE = {
    "MEGASCALE_COORDINATOR_ADDRESS": "base-slice-0-0.base:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "base-worker-0-0.base:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}

# environment -> coordinator, processes, this process, its GPUs (None: all that it sees).
CLUSTERS = {
    "local_processes.sh, tpu_vm.sh, gke_jobset.sh": (
        EXPLICIT,
        ("base-worker-0-0.base:8476", 4, 3, None),
    ),
    "explicit, inside a SLURM step": (
        {**SRUN, **EXPLICIT},
        ("base-worker-0-0.base:8476", 4, 3, [1]),
    ),
    "slurm.sh": (SRUN, ("gpu03:61586", 8, 5, [1])),
    "xpk.sh, TPU": (GKE_TPU, ("base-0-0.base:8482", 2, 1, None)),
    "xpk.sh, TPU, addresses": (
        {
            "TPU_SKIP_MDS_QUERY": "true",
            "TPU_WORKER_ID": "1",
            "TPU_PROCESS_ADDRESSES": "base-0-0.base:8471,base-0-1.base:8471",
        },
        ("base-0-0.base:8482", 2, 1, None),
    ),
    "several slices": ({**GKE_TPU, **MEGASCALE}, ("base-slice-0-0.base:8482", 6, 5, None)),
    "several slices of one machine": (
        {**GKE_TPU, **MEGASCALE, "TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"},
        ("base-slice-0-0.base:8482", 3, 2, None),
    ),
}
ALONE = {
    "nothing set": {},
    "one task of SLURM": {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "a SLURM batch script": SBATCH,
    "one TPU machine of GKE": {**GKE_TPU, "TPU_WORKER_HOSTNAMES": "localhost"},
}


@pytest.fixture
def arguments(monkeypatch):
    """environment -> arguments of jax.distributed.initialize, or None if it is not called."""

    def initialize(environment):
        for name in list(os.environ):
            if name.startswith(("JAX_COORD", "JAX_NUM_", "JAX_PROC", "SLURM", "TPU_", "MEGASCALE")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
        distributed.initialize(lambda line: None)
        assert len(calls) <= 1
        return calls[0] if calls else None

    before = jax.config.jax_cpu_collectives_implementation
    yield initialize
    jax.config.update("jax_cpu_collectives_implementation", before)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_recognised(name, arguments, monkeypatch):
    environment, expected = CLUSTERS[name]
    given = arguments(environment)
    assert given is not None
    tpu = any(variable.startswith("TPU_") for variable in environment)
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", tpu)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", tpu)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    # The metadata server of a pod, which JAX asks for variables that are not set.
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    found = ClusterEnv.auto_detect_unset_distributed_params(
        given.get("coordinator_address"),
        given.get("num_processes"),
        given.get("process_id"),
        None,
        None,
        given["initialization_timeout"],
    )
    assert found == expected


@pytest.mark.parametrize("name", ALONE)
def test_one_process_waits_for_no_other(name, arguments):
    assert arguments(ALONE[name]) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES is not set"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be a number from 0"),
    ],
)
def test_an_incomplete_environment_is_rejected(environment, message, arguments):
    with pytest.raises(DistributedError, match=message):
        arguments(environment)
