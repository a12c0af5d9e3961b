#!/usr/bin/env bash
# What launch/slurm.sh submits. SLURM copies this file and runs it on the job's first node.
#   launch/slurm_job.sh COMMAND...
# Its exit status is srun's: the highest of all processes. scancel ends this script as well, before
# it can queue the job again.
set -euo pipefail
# When a process fails the others wait for it for ever, so they are ended, but not at once: after
# a preemption they are still saving.
srun --label --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" &&
  status=0 || status=$?
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
