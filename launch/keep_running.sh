#!/usr/bin/env bash
# Runs a command and restarts it for as long as it exits with status 75 (preempted, state saved).
#   launch/keep_running.sh [--delay=SECONDS] [--dry_run] COMMAND...
# Any other status ends this script with that status. SIGTERM and SIGINT are passed on, and end the
# restarts. --delay (5): wait before a restart, as a preempted machine may be about to disappear.
set -euo pipefail
delay=5
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "delay= ..." "$@"
need_number delay 5 0
[ ${#words[@]} -gt 0 ] || refuse "COMMAND is missing; see --help"
if [ -n "$dry_run" ]; then
  run "${words[@]}"
  exit
fi

ended() { status=$2; }

forward_signals
while true; do
  start "${words[@]}"
  [ -z "$signalled" ] || signal_all TERM # the signal came before the command started
  each_end ended $!
  if [ "$status" -ne 75 ] || [ -n "$signalled" ]; then exit "$status"; fi
  printf '%s: status 75; starting again in %s s\n' "$program" "$delay" >&2
  for ((second = 0; second < delay; second++)); do
    [ -z "$signalled" ] || exit 75
    sleep 1
  done
done
