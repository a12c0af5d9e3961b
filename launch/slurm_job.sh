#!/usr/bin/env bash
# The job that launch/slurm.sh submits. SLURM copies this file and runs it on the first node.
#   launch/slurm_job.sh COMMAND...
# Its exit status is srun's: the highest of all processes. scancel ends this script too, before it
# can queue the job again.
set -euo pipefail
# When a process fails, the others would wait for it without end. srun ends them after 60 s: after a
# preemption they are still saving.
srun --label --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" &&
  status=0 || status=$?
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
