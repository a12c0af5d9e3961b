"""The launch scripts: wrong usage ends with one line, before anything is started."""

import pytest

from tests.reference.launch import (
    CASCADE,
    GKE,
    GPU_NODES,
    MAKE,
    OVERRIDE,
    SLICE,
    SLURM,
    TPU_NODES,
    TRAIN,
    XPK,
    launch,
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tpu_vm.sh"], "tpu_vm.sh: VERB is missing"),
        (["tpu_vm.sh", "stat", *SLICE], "tpu_vm.sh: stat is not a verb; there are create, "),
        (["tpu_vm.sh", "stop", "logs", *SLICE], "one verb at a time, not also logs"),
        (["tpu_vm.sh", "stop", "--zone=z"], "tpu_vm.sh stop: --name is missing; e.g. --name=base"),
        (
            ["tpu_vm.sh", "start", "--name=base", *TRAIN],
            "tpu_vm.sh start: --zone is missing; e.g. --zone=us-central2-b",
        ),
        (["tpu_vm.sh", "create", *SLICE, MAKE[1]], "tpu_vm.sh create: --accelerator is missing"),
        (["tpu_vm.sh", "resume", *SLICE, MAKE[0], *TRAIN], "resume: --runtime is missing"),
        (["tpu_vm.sh", "start", *SLICE, TRAIN[1]], "--config is missing; e.g. --config=configs/"),
        (["tpu_vm.sh", "start", *SLICE, TRAIN[0]], "is missing; e.g. --workdir=gs://my-"),
        (["tpu_vm.sh", "stop", "--name=Base_64", "--zone=z"], "--name=Base_64 must be a letter"),
        (["tpu_vm.sh", "stop", "--zoen=z"], "--zoen=z is not an option; there are --name --zone "),
        (["tpu_vm.sh", "stop", "--zone", "z"], "--zone needs a value: --zone=VALUE"),
        (["tpu_vm.sh", "stop", "--spot=yes"], "--spot takes no value"),
        (["tpu_vm.sh", "stop", "--config.a.b"], "--config.a.b needs a value"),
        (
            ["tpu_vm.sh", "stop", "--config.a.b", "--zone=z"],
            "b=VALUE or --config.a.b VALUE",
        ),
        (["tpu_vm.sh", "stop", "--config.a", "1\n2"], "--config.a=1... has more than one line"),
        (["tpu_vm.sh", "stop", "--config.a=1\n2"], "--config.a=1... has more than one line"),
        (["tpu_vm_worker.sh"], "install, prepare, embed or start COMMAND..., logs or stop; not"),
        ([*GKE[:2], *GKE[3:], *TPU_NODES], "gke_jobset.sh: --image is missing"),
        ([*GKE, *TPU_NODES[1:]], "--accelerator is missing"),
        ([*GKE, TPU_NODES[0], *TPU_NODES[2:]], "--topology is missing"),
        ([*GKE, *GPU_NODES, "--topology=2x2"], "--topology is for TPUs, not for nvidia-h100-80gb"),
        ([*GKE, GPU_NODES[0], "--chips=8", "--nodes=0"], "--nodes=0 must be a whole number from 1"),
        ([*GKE, *GPU_NODES, "--max_restarts=x"], "--max_restarts=x must be a whole number from 0"),
        ([*GKE, *GPU_NODES, "--template=no.yaml"], "--template=no.yaml: no such file"),
        ([*GKE, *GPU_NODES, "apply"], "apply is not a step; there are prepare, embed and train"),
        ([*SLURM, "prepare", "embed"], "one step at a time, not also embed"),
        (["xpk.sh", "embed", *XPK[1:], TRAIN[0]], "xpk.sh: --accelerator is missing"),
        (["slurm.sh", "prepare", *SLURM[1:3]], "slurm.sh: --config is missing"),
        ([*GKE, "embed", *TPU_NODES[:3], "--chips=8"], "--chips=8: embed on several machines"),
        (["gke_jobset.sh", "embed", *GKE[1:4], *TPU_NODES, "--claim=c"], "--workdir is missing"),
        ([*XPK, *TRAIN], "xpk.sh: --accelerator is missing"),
        ([*XPK[:2], *XPK[3:], *TRAIN], "xpk.sh: --cluster is missing"),
        ([*XPK, *TRAIN, "--accelerator=v6e-8", *OVERRIDE], "cannot carry a quote or a backslash"),
        (["slurm.sh", *SLURM[2:]], "slurm.sh: --gpus_per_node is missing"),
        ([*SLURM[:2], *TRAIN], "slurm.sh: --time is missing; e.g. --time=24:00:00"),
        ([*CASCADE[:2], CASCADE[3]], "cascade.sh: --stages is missing"),
        ([*CASCADE, "--launcher=k8s"], "--launcher=k8s must be local, tpu_vm, slurm, xpk or gke"),
        ([*CASCADE, "--zone=z"], "--zone=z is not an option of --launcher=local"),
        ([*CASCADE, "--gpus=0"], "--gpus=0 must name 2 GPUs"),
        ([*CASCADE, "--launcher=slurm", "--gpus=0,1"], "--gpus is for --launcher=local"),
        ([*CASCADE, "--workdir=gs://my-bucket/c", "--launcher=xpk"], "--logs is missing"),
        (["local_processes.sh"], "COUNT, a number above 0, comes first"),
        (["local_processes.sh", "0", "true"], "COUNT, a number above 0, comes first"),
        (["local_processes.sh", "2"], "COMMAND is missing"),
        (["local_processes.sh", "--prot=1", "2", "true"], "--prot=1 is not an option; there are"),
        (["keep_running.sh", "--delay=1"], "COMMAND is missing"),
    ],
)
@pytest.mark.parametrize("dry_run", ["--dry_run", None])
def test_refused(arguments, says, dry_run, recorder):
    folder, calls = recorder
    script, *rest = arguments
    result = launch(script, *filter(None, [dry_run]), *rest, path=folder)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and result.stdout == "", result
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith(script), lines
    assert calls() == []
