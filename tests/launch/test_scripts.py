"""The launch scripts: --dry_run, --help, shellcheck and file modes.

IMAGEN_UPDATE_SNAPSHOTS=1 rewrites the snapshots of --dry_run.
"""

import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys

import pytest

from tests.reference.launch import (
    CAPTURE,
    CASES,
    DATA,
    ODD,
    OVERRIDE,
    ROOT,
    SNAPSHOTS,
    launch,
    variables,
)

SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))
WITH_OPTIONS = sorted(
    set(SCRIPTS)
    - {
        "demo.sh",
        "demo_256.sh",
        "distill.sh",
        "emoji.sh",
        "folder.sh",
        "lib.sh",
        "steps.sh",
        "slurm_job.sh",
    }
)


@pytest.mark.parametrize("name", CASES)
def test_snapshot(name):
    script, *arguments = CASES[name]
    result = launch(script, "--dry_run", *arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("IMAGEN_UPDATE_SNAPSHOTS"):
        path.write_text(result.stdout)
    assert result.stdout == path.read_text()


def test_no_snapshot_is_left_over():
    assert {p.stem for p in SNAPSHOTS.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize(
    "name",
    ["tpu_vm_create_queued", "tpu_vm_install", "tpu_vm_start", "tpu_vm_delete", "xpk_tpu", "slurm"]
    + ["xpk_prepare", "slurm_embed"],
)
def test_a_pasted_dry_run_does_what_the_script_does(name, recorder):
    folder, calls = recorder
    assert launch(*CASES[name], path=folder).returncode == 0
    done = calls()
    assert done
    pasted = (SNAPSHOTS / f"{name}.txt").read_text()
    subprocess.run(["bash", "-c", pasted], cwd=ROOT, env=variables(folder), check=True)
    assert calls() == done


def test_odd_characters_reach_the_training(recorder):
    folder, calls = recorder
    launch(*CASES["slurm"], path=folder)
    assert calls()[0][-1] == OVERRIDE[0]
    launch(*CASES["tpu_vm_start"], path=folder)
    (remote,) = [a for a in calls()[0] if a.startswith("--command=")]
    assert shlex.split(remote)[-1] == OVERRIDE[0]
    result = launch(*CASES["local_processes"])
    assert sorted(result.stdout.splitlines()) == [f"[0] {ODD}", f"[1] {ODD}"]


@pytest.mark.parametrize(
    "name", ["tpu_vm_start", "gke_jobset_gpu", "xpk_tpu", "slurm", "cascade_local", "cascade_slurm"]
)
def test_an_override_in_two_words_equals_one(name):
    script, *arguments = CASES[name]
    one = launch(script, "--dry_run", "--config.a.b=c d", *arguments, "--config.e=-1")
    two = launch(script, "--config.a.b", "c d", "--dry_run", *arguments, "--config.e", "-1")
    assert two.returncode == 0 and two.stdout == one.stdout, two.stderr
    assert "--config.e=-1" in one.stdout


@pytest.mark.parametrize("override", [["--config.text.path=t5"], ["--config.text.path", "t5"]])
def test_a_public_encoder_is_not_pretrained(override, tools, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompts.jsonl").touch()
    path = tools(python=f'[ "$1" = -c ] && echo cpu False || echo "$@" >>{tmp_path}/calls')
    environment = {"PYTHON": str(path / "python")}
    for words in ([], override):
        done = launch("folder.sh", "images", tmp_path / "run", *words, **environment)
        assert done.returncode == 0, done.stderr
    verbs = [line.split()[2] for line in (tmp_path / "calls").read_text().splitlines()]
    both = ["export", "export", "train", "train"]  # The trainings run at the same time.
    first, second = verbs[:8], verbs[8:]
    assert (first[:3], sorted(first[3:7])) == (["prepare", "pretrain_text", "embed"], both)
    assert (second[:2], sorted(second[2:6])) == (["prepare", "embed"], both)
    assert first[7:] == second[6:] == ["sample"]


@pytest.mark.parametrize(
    ("step", "machine", "runs"),
    [
        ("prepare", {}, True),
        ("prepare", {"TPU_WORKER_ID": "0"}, True),
        ("prepare", {"TPU_WORKER_ID": "2"}, False),
        ("prepare", {"NNODES": "2", "NODE_RANK": "1"}, False),
        ("embed", {"TPU_WORKER_HOSTNAMES": "a"}, True),
        ("embed", {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_the_command_of_a_step_in_the_container_of_xpk(step, machine, runs, recorder, tools):
    """On which machine it runs, and with which devices."""
    folder, calls = recorder
    launch(*CASES[f"xpk_{step}"], path=folder)
    (option,) = [word for word in calls()[0] if word.startswith("--command=")]
    code = option.removeprefix("--command=").replace("$$", "$")
    path = tools(python='echo "$@"; env | grep -E "^(TPU_PROCESS|JAX)_" || true')
    environment = {"PATH": f"{path}:{os.environ['PATH']}", **machine}
    done = subprocess.run(["sh", "-c", code], env=environment, **CAPTURE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:1] == ([" ".join(["-m imagen_jax", step, *DATA])] if runs else [])
    if runs:
        several = machine.get("TPU_WORKER_HOSTNAMES") == "a,b"
        expected = ["JAX_PLATFORMS=cpu"] if step == "prepare" else ["TPU_PROCESS_BOUNDS=1,1,1"]
        assert lines[1:] == (expected if step == "prepare" or several else [])


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_help_names_every_option(script):
    result = launch(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"launch/{script}" in result.stdout and "set -euo" not in result.stdout
    (options,) = re.findall(r'^parse "([^"]*)"', (ROOT / "launch" / script).read_text(), re.M)
    for name in re.findall(r"\w+", options):
        assert f"--{name}" in result.stdout, name


@pytest.mark.parametrize(
    "script", ["demo.sh", "demo_256.sh", "distill.sh", "emoji.sh", "folder.sh"]
)
def test_help_of_a_script_without_options(script):
    result = launch(script, "--help", PYTHON="false")
    assert result.returncode == 0 and result.stderr == ""
    assert f"launch/{script}" in result.stdout and "set -euo" not in result.stdout


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    paths = [ROOT / "launch" / name for name in SCRIPTS]
    result = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *paths], **CAPTURE)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


def test_scripts_are_executable():
    for name in set(SCRIPTS) - {"lib.sh", "steps.sh"}:
        assert (ROOT / "launch" / name).stat().st_mode & stat.S_IXUSR, name
