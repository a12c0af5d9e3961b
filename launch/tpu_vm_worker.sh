#!/usr/bin/env bash
# Runs on each worker of a slice, in the folder of the code there; launch/tpu_vm.sh calls it.
#   launch/tpu_vm_worker.sh install | prepare COMMAND... | embed COMMAND... | start COMMAND... | logs | stop
# The command writes to train.log; train.pid holds the process that restarts it.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "..." "$@"

# Checks the name too: after a reboot the number may belong to another process.
running() {
  [ -e train.pid ] && grep -qs keep_running "/proc/$(<train.pid)/cmdline"
}

metadata() {
  curl --silent --show-error --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# The processes of a slice find each other through the variables that imagen_jax/parallel/distributed.py
# reads. An endpoint is three fields, the last its address; worker 0 comes first.
export_who_takes_part() {
  local endpoints first
  IFS=, read -ra endpoints <<<"$(metadata worker-network-endpoints)"
  [ ${#endpoints[@]} -gt 1 ] || return 0
  IFS=: read -r _ _ first <<<"${endpoints[0]}"
  JAX_PROCESS_ID=$(metadata agent-worker-number)
  export JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS=$first:8476 JAX_NUM_PROCESSES=${#endpoints[@]}
}

# This worker's chips alone, without the other workers of the slice.
export_own_chips() {
  local chips=(/dev/accel* /dev/vfio/[0-9]*) count=0 chip
  for chip in "${chips[@]}"; do [ ! -e "$chip" ] || count=$((count + 1)); done
  case $count in
    4) export TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=1,1,1 TPU_VISIBLE_DEVICES=0,1,2,3 ;;
    8)
      export TPU_CHIPS_PER_PROCESS_BOUNDS=2,4,1 TPU_PROCESS_BOUNDS=1,1,1
      export TPU_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
      ;;
  esac
}

case ${words[0]-} in
  install)
    # TPU machine images have an older Python than the package needs; uv installs one.
    run python3 -m pip install --quiet --user uv
    run python3 -m uv venv --quiet --allow-existing --python=3.11 .venv
    run python3 -m uv pip install --quiet --python=.venv/bin/python -c constraints.txt \
      -e '.[tpu,data]'
    ;;
  prepare) JAX_PLATFORMS=cpu exec "${words[@]:1}" ;;
  embed)
    export_own_chips
    exec "${words[@]:1}"
    ;;
  start)
    if running; then
      printf '%s: already running, process %s\n' "$program" "$(<train.pid)" >&2
      exit 1
    fi
    export_who_takes_part
    # A session of its own survives the end of the connection.
    nohup setsid bash launch/keep_running.sh "${words[@]:1}" >>train.log 2>&1 </dev/null &
    echo $! >train.pid
    printf 'worker %s: started, process %s\n' "${JAX_PROCESS_ID-0}" $!
    ;;
  logs) exec tail -n 200 -F train.log ;;
  stop)
    running || exit 0
    kill "$(<train.pid)"
    while running; do sleep 0.2; done # it is saving
    ;;
  *) refuse "install, prepare, embed or start COMMAND..., logs or stop; not ${words[0]-nothing}" ;;
esac
