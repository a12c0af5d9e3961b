#!/usr/bin/env bash
# Trains on a GKE cluster that was created with xpk: `xpk workload create`.
#   launch/xpk.sh [STEP] --name=NAME --cluster=CLUSTER --zone=ZONE --accelerator=TYPE --image=IMAGE
#       --config=FILE:NAME --workdir=gs://BUCKET/RUN [options] [--config.a.b=value ...]
# Steps, before a training; their workload is NAME-STEP, and they need no --workdir:
#   prepare   index the data, on the first machine: [--config.data.path=gs://... ...]
#   embed     encode the captions on all machines, each for itself; they share the work
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
take_step
need_name base
need cluster my-cluster
need zone us-central2-b
need accelerator v6e-16
need image us-docker.pkg.dev/my-project/images/imagen_jax:1
need_number max_restarts 100 0
need_number grace 600
step_line "$python" "$step"

command=$(quote "${line[@]}")
# For GPUs xpk writes the command between double quotes into YAML, unescaped.
[[ $command != *[\"\\]* ]] || refuse "xpk cannot carry a quote or a backslash: $command"
# Kubernetes expands $(NAME); $$ is a plain $. exec: xpk passes SIGTERM on to the first process of
# the command, which must be the step's.
command="exec ${command//\$/\$\$}"
# On GPUs xpk describes the processes with variables of its own; on TPUs GKE does.
# shellcheck disable=SC2016 # the container's shell expands the variables
case $step in
  prepare)
    command='test ${TPU_WORKER_ID:-${NODE_RANK:-0}} = 0 || exit 0; export JAX_PLATFORMS=cpu; '$command
    slices='' nodes=''
    ;;
  embed) # A machine of a slice of several has four chips.
    own='export TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=1,1,1 TPU_VISIBLE_DEVICES=0,1,2,3'
    command='case $TPU_WORKER_HOSTNAMES in *,*) '$own' ;; esac; '$command
    ;;
  train)
    who='export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK'
    command='test -z $NNODES || '$who'; '$command
    ;;
esac
[ "$step" = train ] || name+=-$step

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
