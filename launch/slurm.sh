#!/usr/bin/env bash
# A training run on the GPU nodes of a SLURM cluster; run it on a login node, in this folder.
#   launch/slurm.sh [STEP] --gpus_per_node=N --time=LIMIT --config=FILE:NAME --workdir=DIR
#       [--nodes=1] [options] [--config.a.b=value ...]
# Steps, before a training; they need no --workdir:
#   prepare   index the data, on one node: [--config.data.path=gs://... ...]
#   embed     encode the captions, one process per node; they share the work
#   --partition=NAME     the cluster's default if not given
#   --cpus_per_gpu=8     cores that decode images
#   --max_restarts=100   preemptions count too
#   --name=imagen        of the job; its log is NAME-JOB.log
#   --sbatch='OPTIONS'   more of sbatch's own, e.g. --sbatch='--account=lab --exclusive'
#   --dry_run
# 120 s before the limit, or when the job is preempted, the training saves and exits with status
# 75. It exits with 75 or by a signal if it hangs or a node is lost. The job then queues again and
# resumes. The job runs launch/slurm_job.sh.
set -euo pipefail
gpus_per_node='' time='' config='' workdir='' nodes=1 partition='' cpus_per_gpu=8 name=imagen sbatch=''
max_restarts=100
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "gpus_per_node= time= config= workdir= nodes= partition= cpus_per_gpu= name= sbatch=
  max_restarts=" "$@"
take_step
need_number gpus_per_node 8
need_number nodes 2
need_number cpus_per_gpu 8
need_number max_restarts 100 0
need time 24:00:00
step_line "$(default_python)" "$step"

options=("--job-name=$name" "--output=$name-%j.log" --open-mode=append)
[ -z "$partition" ] || options+=("--partition=$partition")
[ "$step" != prepare ] || nodes=1
options+=("--nodes=$nodes" "--gpus-per-node=$gpus_per_node" "--time=$time")
if [ "$step" = train ]; then
  # One process for each GPU: jax.distributed reads SLURM's variables and gives each process the GPU
  # with its local number. Each process must therefore see all GPUs: no --gpus-per-task.
  options+=("--ntasks-per-node=$gpus_per_node" "--cpus-per-task=$cpus_per_gpu")
else
  options+=(--ntasks-per-node=1 "--cpus-per-task=$((cpus_per_gpu * gpus_per_node))")
fi
# To the processes only: the script must stay alive to queue the job again.
options+=(--signal=TERM@120 --requeue)
read -ra more <<<"$sbatch"
run sbatch "${options[@]}" "${more[@]}" "$(dirname "$0")/slurm_job.sh" "$max_restarts" \
  "${line[@]}"
