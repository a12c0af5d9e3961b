"""launch/cascade.sh: all stages of a cascade at once, here or through another launcher."""

import subprocess

import pytest

from tests.reference.launch import CASCADE, ROOT, command, launch, until, variables


@pytest.fixture
def python(tools, tmp_path):
    """A stand-in for Python; python(x=shell code) sets what the training of stage x does."""

    def make(**stages):
        cases = " ".join(f"*.py:{name}) {code} ;;" for name, code in stages.items())
        return tools(python=f'echo "$@" $CUDA_VISIBLE_DEVICES\ncase $4 in {cases} esac')

    return make


def test_a_cascade_trains_all_stages(python, tools, tmp_path):
    runs = tmp_path / "runs"
    again = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; exit 75; }}"
    path = python(base=again, sr="sleep 0.3; exit 3", sr2="exit 0")
    cascade = ["cascade.sh", "--config=c.py", "--stages=base,sr,sr2", f"--workdir={runs}"]
    environment = {"PYTHON": str(path / "python"), "path": path}
    tools(sleep="exec /bin/sleep 0.3")
    result = launch(*cascade, "--gpus=4,5,6", "--config.a.b=x y", **environment)
    assert result.returncode == 3
    ends = [line for line in result.stdout.splitlines() if "exit status" in line]
    assert sorted(ends) == [
        f"base: exit status 0 ({runs}/base.log)",
        f"sr2: exit status 0 ({runs}/sr2.log)",
        f"sr: exit status 3 ({runs}/sr.log)",
    ]
    line = f"-m imagen_jax train --config=c.py:base --workdir={runs}/base --config.a.b=x y 4"
    log = (runs / "base.log").read_text().splitlines()
    assert log == [line, "keep_running.sh: status 75; starting again in 5 s", line]
    assert (runs / "sr2.log").read_text().endswith(f"--workdir={runs}/sr2 --config.a.b=x y 6\n")


def test_a_cascade_passes_signals_on(python, tmp_path):
    waits = "trap 'echo saved; exit 75' TERM; touch {0}/$$.up; while :; do sleep 0.05; done"
    path = python(base=waits.format(tmp_path), sr=waits.format(tmp_path))
    argv = command("cascade.sh", "--config=c.py", "--stages=base,sr", f"--workdir={tmp_path}/runs")
    process = subprocess.Popen(
        argv, cwd=ROOT, env=variables(path, {"PYTHON": f"{path}/python"}), stdout=subprocess.PIPE
    )
    assert until(lambda: len(list(tmp_path.glob("*.up"))) == 2)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 75
    for stage in ("base", "sr"):
        assert (tmp_path / f"runs/{stage}.log").read_text().endswith("\nsaved\n")


def test_a_cascade_submits_every_stage(recorder, tmp_path):
    folder, calls = recorder
    (folder / "mkdir").unlink()
    slurm = ["--launcher=slurm", "--time=1:00:00", "--gpus_per_node=8", f"--workdir={tmp_path}/c"]
    result = launch(*CASCADE, *slurm, path=folder)
    assert result.returncode == 0, result.stdout
    assert sorted((call[1], call[-2]) for call in calls()) == [
        ("--job-name=imagen-base", "--config=configs/shapes.py:base"),
        ("--job-name=imagen-sr-2", "--config=configs/shapes.py:sr_2"),
    ]
    # A launcher that rejects its options counts as a failed stage.
    result = launch(*CASCADE, *slurm[:1], slurm[3], path=folder)
    assert result.returncode == 2 and calls() == []
    assert "--gpus_per_node is missing" in (tmp_path / "c/base.log").read_text()
