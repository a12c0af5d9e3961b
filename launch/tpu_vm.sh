#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size.
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run] [options]
# Verbs and their options:
#   create   make the slice: --accelerator=TYPE --runtime=VERSION [--spot] [--queued]
#   install  copy the checked-out commit to every worker and install it; needs a git checkout
#   prepare  index the data on worker 0: --config=FILE:NAME [--config.data.path=gs://... ...]
#   embed    encode the captions on all workers, each for itself; they share the work. Options of
#            prepare, and --config.data.embeddings=gs://... [--config.text.path=... ...]
#   start    train on all workers, detached from the connection:
#              --config=FILE:NAME --workdir=gs://BUCKET/RUN [--config.a.b=value ...]
#   logs     follow the log of worker 0, or --worker=N
#   resume   create the slice if it was preempted or is missing, wait for it, install, start; takes
#            the options of create and start
#   stop     save and end the training; `start` resumes it
#   delete   delete the slice [--queued]
# --queued requests the slice as a queued resource of the same name, the usual way to get --spot
# machines; give it to create, resume and delete alike. Workers restart the training after status 75
# and after a signal, as launch/keep_running.sh does. `gcloud` reaches several workers with a key in ssh-agent:
# ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
name='' zone='' project='' accelerator='' runtime='' config='' workdir='' spot='' queued='' worker=0
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "name= zone= project= accelerator= runtime= config= workdir= spot queued worker=" "$@"
verb=${words[0]-}
case $verb in
  create | install | prepare | embed | start | logs | resume | stop | delete) program+=" $verb" ;;
  '') refuse "VERB is missing: create, install, prepare, embed, start, logs, resume, stop or delete" ;;
  *)
    refuse "$verb is not a verb; there are create, install, prepare, embed, start, logs, resume, stop, delete"
    ;;
esac
[ ${#words[@]} -eq 1 ] || refuse "one verb at a time, not also ${words[1]}"
need_name base
need zone us-central2-b
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

vm() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_workers() { vm ssh "--worker=$1" "--command=cd imagen_jax && bash launch/tpu_vm_worker.sh $2"; }

need_slice() {
  need accelerator v6e-16
  need runtime v2-alpha-tpuv6e
}

create() {
  local tier=()
  [ -z "$spot" ] || tier=(--spot)
  if [ -n "$queued" ]; then
    queue create "--node-id=$name" "--accelerator-type=$accelerator" \
      "--runtime-version=$runtime" "${tier[@]}"
  else
    vm create "--accelerator-type=$accelerator" "--version=$runtime" "${tier[@]}"
  fi
}

delete() {
  if [ -n "$queued" ]; then queue delete --force "$@"; else vm delete "$@"; fi
}

# The state that gcloud reports; empty when there is no such slice.
state() {
  if [ -n "$queued" ]; then
    queue describe '--format=value(state.state)'
  else
    vm describe '--format=value(state)'
  fi
}

make_ready() {
  local now
  if [ -n "$dry_run" ]; then
    echo '# repeated until it is READY or ACTIVE:'
    state
    echo '# only if it is PREEMPTED, TERMINATED or SUSPENDED:'
    delete --quiet
    echo '# only then, or if there is no slice:'
    create
    echo '# then:'
    return
  fi
  while true; do
    now=$(state 2>/dev/null || true)
    case $now in
      READY | ACTIVE) return ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        delete --quiet
        create
        ;;
      '') create ;;
      FAILED | STOPPED | STOPPING | DELETING)
        printf '%s: %s is %s; look at it, or delete it first\n' "$program" "$name" "$now" >&2
        exit 1
        ;;
      *)
        printf '%s: %s is %s; looking again in 30 s\n' "$program" "$name" "$now" >&2
        sleep 30
        ;;
    esac
  done
}

# A commit rather than the folder: without runs and virtual environments, and identifiable.
install() {
  run mkdir -p runs
  run git archive --format=tar.gz "--output=runs/$name.tar.gz" HEAD
  run gcloud compute tpus tpu-vm scp "runs/$name.tar.gz" "$name:imagen_jax.tar.gz" \
    "${where[@]}" --worker=all
  vm ssh --worker=all "--command=mkdir -p imagen_jax && tar -xzf imagen_jax.tar.gz -C imagen_jax"
  on_workers all install
}

case $verb in
  create)
    need_slice
    create
    ;;
  install) install ;;
  prepare | embed)
    step_line .venv/bin/python "$verb"
    workers=all
    [ "$verb" = embed ] || workers=0
    on_workers "$workers" "$verb $(quote "${line[@]}")"
    ;;
  start)
    train_line .venv/bin/python
    on_workers all "start $(quote "${train[@]}")"
    ;;
  resume)
    need_slice
    train_line .venv/bin/python
    make_ready
    install
    on_workers all "start $(quote "${train[@]}")"
    ;;
  logs) on_workers "$worker" logs ;;
  stop) on_workers all stop ;;
  delete) delete ;;
esac
