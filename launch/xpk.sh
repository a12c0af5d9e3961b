#!/usr/bin/env bash
# Trains on a GKE cluster that was created with xpk: `xpk workload create`.
#   launch/xpk.sh --name=NAME --cluster=CLUSTER --zone=ZONE --accelerator=TYPE --image=IMAGE
#       --config=FILE:NAME --workdir=/SHARED/RUN [options] [--config.a.b=value ...]
# --accelerator is xpk's device type: v6e-16, v5litepod-64, h100-mega-80gb-8, ...
#   --slices=N, --nodes=N   more than one slice of TPUs, more than one GPU machine
#   --project=PROJECT       default: gcloud's project
#   --max_restarts=N        preemptions count too (100)
#   --grace=SECONDS         time to save when a node is drained (600)
#   --python=python         interpreter in the image
#   --dry_run
# Exit status 75, and those of lost machines, restart the run; others end it.
set -euo pipefail
name='' cluster='' zone='' project='' accelerator='' image='' config='' workdir='' slices='' nodes=''
max_restarts=100 grace=600 python=python
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "name= cluster= zone= project= accelerator= image= config= workdir= slices= nodes=
  max_restarts= grace= python=" "$@"
[ ${#words[@]} -eq 0 ] || refuse "${words[0]} is not an option; see --help"
need_name base
need cluster my-cluster
need zone us-central2-b
need accelerator v6e-16
need image us-docker.pkg.dev/my-project/images/imagen_jax:1
need_number max_restarts 100 0
need_number grace 600
train_line "$python"

training=$(quote "${train[@]}")
# For GPUs xpk writes the command between double quotes into YAML, unescaped.
[[ $training != *[\"\\]* ]] || refuse "xpk cannot carry a quote or a backslash: $training"
# On GPUs xpk describes the processes with variables of its own; on TPUs GKE does. exec: xpk passes
# SIGTERM on to the first process of the command, which must be the training.
# shellcheck disable=SC2016 # the container's shell expands the variables
who='test -z $NNODES || export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK'
# Kubernetes expands $(NAME); $$ is a plain $.
command="$who; exec ${training//\$/\$\$}"

options=("--workload=$name" "--cluster=$cluster" "--zone=$zone")
[ -z "$project" ] || options+=("--project=$project")
options+=("--device-type=$accelerator" "--docker-image=$image")
if [ -n "$slices" ]; then
  need_number slices 2
  options+=("--num-slices=$slices")
fi
if [ -n "$nodes" ]; then
  need_number nodes 2
  options+=("--num-nodes=$nodes")
fi
run xpk workload create "${options[@]}" "--max-restarts=$max_restarts" \
  --restart-on-exit-codes=75 "--termination-grace-period-seconds=$grace" "--command=$command"
