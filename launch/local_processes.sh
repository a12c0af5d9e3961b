#!/usr/bin/env bash
# Starts several processes of one run on one machine, connected over loopback.
#   launch/local_processes.sh [--port=N] [--grace=SECONDS] [--dry_run] COUNT COMMAND...
# e.g.
#   launch/local_processes.sh 2 .venv/bin/python -m imagen_jax train --config=... --workdir=...
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and computes on
# the CPU unless JAX_PLATFORMS is set. Its lines begin with its number: [0]. SIGTERM and SIGINT are
# passed on to all.
# The exit status is that of the first process that ends with another one than 0, else 0. When a
# process fails, the others would wait for it without end: they get SIGTERM and, --grace (60) seconds
# later, SIGKILL. After status 75 they get no SIGTERM: they are saving, or find the lost process too.
set -euo pipefail
port='' grace=60
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "port= grace= ..." "$@"
[ -z "$port" ] || need_number port 20000
need_number grace 60
count=${words[0]-}
[[ $count =~ ^[1-9][0-9]*$ ]] || refuse "COUNT, a number above 0, comes first; see --help"
[ ${#words[@]} -gt 1 ] || refuse "COMMAND is missing; see --help"

# Below the range of outgoing connections, so that none takes the port meanwhile.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

address=127.0.0.1:${port:-$(free_port)}
command_of() { # sets `command`; `env` leaves no process of its own
  command=(env "JAX_PLATFORMS=${JAX_PLATFORMS-cpu}" "JAX_COORDINATOR_ADDRESS=$address"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1" "${words[@]:1}")
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf '%s &\n' "$(quote "${command[@]}")"
  done
  echo wait
  exit
fi

pids=() prefixers=() first=0 killer=''
# Ignores signals: a process still writes lines after SIGTERM.
prefix() {
  trap '' TERM INT
  exec sed -u "s/^/[$1] /"
}

# shellcheck disable=SC2329 # `ended` starts it
kill_all() {
  sleep "$grace"
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

# shellcheck disable=SC2329 # each_end calls it
ended() {
  # Children of the process must not outlive it or keep its output open.
  kill -KILL -- "-${pids[$1]}" 2>/dev/null || true
  if [ "$2" -eq 0 ] || [ "$first" -ne 0 ]; then return; fi
  first=$2
  printf '%s: process %s ended with status %s\n' "$program" "$1" "$2" >&2
  start kill_all
  killer=$!
  disown "$killer" # signals are not passed on to it
  if [ "$first" -ne 75 ] && [ -z "$signalled" ]; then signal_all TERM; fi
}

forward_signals
for ((i = 0; i < count; i++)); do
  [ -z "$signalled" ] || break
  exec {out}> >(prefix "$i")
  prefixers+=($!)
  exec {err}> >(prefix "$i" >&2)
  prefixers+=($!)
  command_of "$i"
  start "${command[@]}" 1>&"$out" 2>&"$err"
  pids+=($!)
  exec {out}>&- {err}>&-
done
each_end ended "${pids[@]}"
[ -z "$killer" ] || kill -KILL -- "-$killer" 2>/dev/null || true
for pid in "${prefixers[@]}"; do wait "$pid" 2>/dev/null || true; done
exit "$first"
