#!/usr/bin/env bash
# A training run on the GPU nodes of a SLURM cluster; run it on a login node, in this folder.
#   launch/slurm.sh --gpus_per_node=N --time=LIMIT --config=FILE:NAME --workdir=DIR
#       [--nodes=1] [options] [--config.a.b=value ...]
#   --partition=NAME     the cluster's default if not given
#   --cpus_per_gpu=8     they decode pictures
#   --name=imagen        of the job; its lines go to NAME-JOB.log
#   --sbatch='OPTIONS'   more of sbatch's own, e.g. --sbatch='--account=lab --exclusive'
#   --dry_run
# 120 s before the limit, or when the job is preempted, the training saves and exits with status
# 75; the job then queues again and goes on. launch/slurm_job.sh is what runs in the job.
set -euo pipefail
gpus_per_node='' time='' config='' workdir='' nodes=1 partition='' cpus_per_gpu=8 name=imagen sbatch=''
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "gpus_per_node= time= config= workdir= nodes= partition= cpus_per_gpu= name= sbatch=" "$@"
[ ${#words[@]} -eq 0 ] || refuse "${words[0]} is not an option; see --help"
need_number gpus_per_node 8
need_number nodes 2
need_number cpus_per_gpu 8
need time 24:00:00
train_line "${PYTHON:-.venv/bin/python}"

options=("--job-name=$name" "--output=$name-%j.log" --open-mode=append)
[ -z "$partition" ] || options+=("--partition=$partition")
options+=("--nodes=$nodes" "--gpus-per-node=$gpus_per_node" "--time=$time")
# One process for each GPU: where jax.distributed reads SLURM's variables, a process takes the one
# GPU that has its number on the node. So each has to see them all: no --gpus-per-task.
options+=("--ntasks-per-node=$gpus_per_node" "--cpus-per-task=$cpus_per_gpu")
# To the processes and not to the script, which has to live on to queue the job again.
options+=(--signal=TERM@120 --requeue)
read -ra more <<<"$sbatch"
run sbatch "${options[@]}" "${more[@]}" "$(dirname "$0")/slurm_job.sh" "${train[@]}"
