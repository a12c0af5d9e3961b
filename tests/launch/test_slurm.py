"""launch/slurm_job.sh: the command on the nodes, and when the job is queued again."""

import pytest

from tests.reference.launch import ODD, launch


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_slurm_queues_again_only_after_75(status, recorder, tools, tmp_path):
    folder, calls = recorder
    tools(srun=f"printf '%s\\n' \"$@\" >{tmp_path}/srun; exit {status}")
    job = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    result = launch("slurm_job.sh", "python", "-m", ODD, path=folder, **job)
    assert result.returncode == status
    assert calls() == ([["scontrol", "requeue", "42"]] if status == 75 else [])
    assert (tmp_path / "srun").read_text().splitlines()[-3:] == ["python", "-m", ODD]
    assert "--cpus-per-task=8" in (tmp_path / "srun").read_text()
