"""Commands of the launch scripts for the tests, one of each kind, and functions to run them.

Snapshots of --dry_run are in `tests/launch/snapshots/`.
"""

import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
SNAPSHOTS = ROOT / "tests" / "launch" / "snapshots"

# Every character with a special meaning in a shell, JSON or YAML.
ODD = 'it\'s "a" $HOME `run`; #1 \\ {x} & *'
SLICE = ["--name=base", "--zone=us-central2-b"]
MAKE = ["--accelerator=v6e-16", "--runtime=v2-alpha-tpuv6e"]
TRAIN = ["--config=configs/shapes.py:base", "--workdir=/shared/base"]
OVERRIDE = [f"--config.text.path={ODD}"]
# Of prepare and embed: no workdir.
DATA = [
    TRAIN[0],
    "--config.data.path=gs://my-bucket/images",
    "--config.data.embeddings=gs://my-bucket/text",
    "--config.text.path=gs://my-bucket/t5",
]
TPU_NODES = ["--accelerator=tpu-v6e-slice", "--topology=4x4", "--nodes=4", "--chips=4"]
GPU_NODES = ["--accelerator=nvidia-h100-80gb", "--nodes=2", "--chips=8"]
IMAGE = ["--name=base", "--image=repo/imagen:1"]
GKE = ["gke_jobset.sh", *IMAGE, *TRAIN]
XPK = ["xpk.sh", "--name=base", "--cluster=c", "--zone=us-central2-b", "--image=repo/imagen:1"]
SLURM = ["slurm.sh", "--gpus_per_node=8", "--time=24:00:00", *TRAIN]
CASCADE = ["cascade.sh", "--config=configs/shapes.py", "--stages=base,sr_2", "--workdir=runs/c"]
SHARED = ["--workdir=/shared/c", "--logs=runs/logs"]

CASES = {
    "local_processes": ["local_processes.sh", "--port=20000", "2", "echo", ODD],
    "keep_running": ["keep_running.sh", "--delay=1", "echo", ODD],
    "install_t5x": ["install_t5x.sh", "--python=py"],
    "tpu_vm_create": ["tpu_vm.sh", "create", *SLICE, *MAKE],
    "tpu_vm_create_queued": ["tpu_vm.sh", "create", *SLICE, *MAKE, "--queued", "--spot"],
    "tpu_vm_install": ["tpu_vm.sh", "install", *SLICE, "--project=p"],
    "tpu_vm_prepare": ["tpu_vm.sh", "prepare", *SLICE, TRAIN[0], *OVERRIDE],
    "tpu_vm_embed": ["tpu_vm.sh", "embed", *SLICE, TRAIN[0], *OVERRIDE],
    "tpu_vm_start": ["tpu_vm.sh", "start", *SLICE, *TRAIN, *OVERRIDE],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *SLICE, "--worker=3"],
    "tpu_vm_resume": ["tpu_vm.sh", "resume", *SLICE, *MAKE, *TRAIN, "--spot"],
    "tpu_vm_resume_queued": ["tpu_vm.sh", "resume", *SLICE, *MAKE, *TRAIN, "--spot", "--queued"],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *SLICE],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *SLICE],
    "tpu_vm_delete_queued": ["tpu_vm.sh", "delete", *SLICE, "--queued"],
    "gke_jobset_tpu": [*GKE, *TPU_NODES, "--spot"],
    "gke_jobset_slices": [*GKE, *TPU_NODES, "--slices=3"],
    "gke_jobset_gpu": [
        *GKE,
        *GPU_NODES,
        *OVERRIDE,
        *("--max_restarts=0", "--grace=60", "--namespace=n", "--service_account=s", "--python=py"),
    ],
    "gke_jobset_prepare": ["gke_jobset.sh", "prepare", *IMAGE, *TPU_NODES, "--slices=3", *DATA],
    "gke_jobset_embed": ["gke_jobset.sh", "embed", *IMAGE, *TPU_NODES, "--slices=3", *DATA],
    "xpk_prepare": [XPK[0], "prepare", *XPK[1:], "--accelerator=v6e-16", "--slices=2", *DATA],
    "xpk_embed": [XPK[0], "embed", *XPK[1:], "--accelerator=v6e-16", "--slices=2", *DATA],
    "xpk_tpu": [*XPK, *TRAIN, "--accelerator=v6e-16", "--slices=2", "--config.text.path=a b"],
    "xpk_gpu": [*XPK, *TRAIN, "--accelerator=h100-80gb-8", "--nodes=2", "--project=p"],
    "slurm": [*SLURM, *OVERRIDE],
    "slurm_prepare": [SLURM[0], "prepare", *SLURM[1:3], "--nodes=4", *DATA],
    "slurm_embed": [SLURM[0], "embed", *SLURM[1:3], "--nodes=4", *DATA],
    "slurm_all": [
        *SLURM,
        *("--partition=gpu", "--nodes=4", "--cpus_per_gpu=12", "--name=run"),
        "--sbatch=--account=lab --exclusive",
    ],
    "cascade_local": [*CASCADE, *OVERRIDE],
    "cascade_gpus": [*CASCADE, "--gpus=0,3"],
    "cascade_tpu_vm": [*CASCADE, *SHARED, "--launcher=tpu_vm", "--zone=z", "--name=if", *OVERRIDE],
    "cascade_slurm": [*CASCADE, "--launcher=slurm", "--time=1:00:00", "--gpus_per_node=8"],
    "cascade_xpk": [*CASCADE, *SHARED, "--launcher=xpk", "--cluster=c"],
    "cascade_gke": [*CASCADE, *SHARED, "--launcher=gke", "--image=i", "--spot"],
}
CAPTURE = {"capture_output": True, "text": True, "timeout": 30}


def launch(script, *arguments, path=None, cwd=ROOT, **environment):
    """Runs a script to completion; `path` is a folder prepended to PATH."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=variables(path, environment), **CAPTURE
    )


def command(script, *arguments):
    return ["bash", f"launch/{script}", *map(str, arguments)]


def variables(path=None, extra=None):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return plain | {"PATH": f"{path or ''}:{os.environ['PATH']}"} | (extra or {})


def until(condition, seconds=10):
    """Waits until the condition holds; False after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
