#!/usr/bin/env bash
# Runs a command and restarts it after status 75 (preempted, hung, or a process of the run is lost) and
# after a signal (status above 128).
#   launch/keep_running.sh [--delay=SECONDS] [--max_restarts=N] [--dry_run] COMMAND...
# Any other status ends this script with that status. SIGTERM and SIGINT are passed on, and end the
# restarts.
#   --delay=5           wait before a restart; doubled after every further run of less than 10 minutes,
#                       up to 300 s
#   --max_restarts=20   restarts in a row after runs of less than 10 minutes
set -euo pipefail
delay=5 max_restarts=20
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "delay= max_restarts= ..." "$@"
need_number delay 5 0
need_number max_restarts 20 0
[ ${#words[@]} -gt 0 ] || refuse "COMMAND is missing; see --help"
if [ -n "$dry_run" ]; then
  run "${words[@]}"
  exit
fi

ended() { status=$2; }

forward_signals
short=0 # runs of less than 10 minutes in a row
while true; do
  began=$SECONDS
  start "${words[@]}"
  [ -z "$signalled" ] || signal_all TERM # the signal came before the command started
  each_end ended $!
  if ! restartable "$status" || [ -n "$signalled" ]; then exit "$status"; fi
  if [ $((SECONDS - began)) -ge 600 ]; then short=0; else short=$((short + 1)); fi
  if [ "$short" -gt "$max_restarts" ]; then
    printf '%s: status %s after --max_restarts=%s short runs\n' "$program" "$status" \
      "$max_restarts" >&2
    exit "$status"
  fi
  wait=$((delay << (short > 1 ? short < 10 ? short - 1 : 9 : 0)))
  if [ "$wait" -gt 300 ]; then wait=$((delay > 300 ? delay : 300)); fi
  printf '%s: status %s; starting again in %s s\n' "$program" "$status" "$wait" >&2
  for ((second = 0; second < wait; second++)); do
    [ -z "$signalled" ] || exit 75
    sleep 1
  done
done
