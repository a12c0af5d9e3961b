#!/usr/bin/env bash
# The job that launch/slurm.sh submits. SLURM copies this file and runs it on the first node.
#   launch/slurm_job.sh MAX_RESTARTS COMMAND...
# Its exit status is srun's: the highest of all processes. After 75 or a signal (above 128) it queues
# the job again, up to MAX_RESTARTS times; SLURM starts it two minutes later at the earliest. scancel
# ends this script too, before it can queue the job again.
set -euo pipefail
max_restarts=$1
shift
# When a process fails, the others would wait for it without end. srun ends them after 60 s: after a
# preemption they are still saving.
srun --label --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" &&
  status=0 || status=$?
if [ "$status" -eq 75 ] || [ "$status" -gt 128 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$max_restarts" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    printf 'slurm_job.sh: status %s after %s restarts\n' "$status" "$max_restarts" >&2
  fi
fi
exit "$status"
