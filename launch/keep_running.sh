#!/usr/bin/env bash
# Runs a command, and again for as long as it exits with status 75: "preempted, start me again".
#   launch/keep_running.sh [--delay=SECONDS] [--dry_run] COMMAND...
# The first other status is this script's own. SIGTERM and SIGINT are passed on, and after them
# nothing is started again. --delay (5): a machine that is being taken away is not raced.
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
  [ -z "$asked" ] || signal_all TERM # the signal came before there was anyone to pass it on to
  each_end ended $!
  if [ "$status" -ne 75 ] || [ -n "$asked" ]; then exit "$status"; fi
  printf '%s: status 75; starting again in %s s\n' "$program" "$delay" >&2
  for ((second = 0; second < delay; second++)); do
    [ -z "$asked" ] || exit 75
    sleep 1
  done
done
