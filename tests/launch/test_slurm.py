"""launch/slurm_job.sh: the command on the nodes, and when the job is queued again."""

import pytest

from tests.reference.launch import ODD, launch


@pytest.mark.parametrize(
    ("status", "before", "again"),
    [(0, None, False), (1, None, False), (2, 0, False), (75, None, True), (137, None, True)]
    + [(134, 1, True), (75, 1, True), (75, 2, False), (137, 3, False)],
)
def test_slurm_queues_again_after_75_and_signals(status, before, again, recorder, tools, tmp_path):
    folder, calls = recorder
    tools(srun=f"printf '%s\\n' \"$@\" >{tmp_path}/srun; exit {status}")
    job = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    job |= {} if before is None else {"SLURM_RESTART_COUNT": str(before)}
    result = launch("slurm_job.sh", 2, "python", "-m", ODD, path=folder, **job)
    assert result.returncode == status
    assert calls() == ([["scontrol", "requeue", "42"]] if again else [])
    assert (tmp_path / "srun").read_text().splitlines()[-3:] == ["python", "-m", ODD]
    assert "--cpus-per-task=8" in (tmp_path / "srun").read_text()
