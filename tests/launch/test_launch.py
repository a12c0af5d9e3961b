"""The launch scripts: what they would run, what they refuse, and that the local ones do it.

Cloud tools are stood in for by programs that record their arguments. Snapshots of --dry_run are in
`snapshots/`; IMAGEN_UPDATE_SNAPSHOTS=1 rewrites them.
"""

import os
import pathlib
import re
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))
WITH_OPTIONS = sorted(
    set(SCRIPTS) - {"demo.sh", "demo_256.sh", "folder.sh", "lib.sh", "steps.sh", "slurm_job.sh"}
)

# Every kind of character that a shell, JSON or YAML reads in its own way.
ODD = 'it\'s "a" $HOME `run`; #1 \\ {x} & *'
SLICE = ["--name=base", "--zone=us-central2-b"]
MAKE = ["--accelerator=v6e-16", "--runtime=v2-alpha-tpuv6e"]
TRAIN = ["--config=configs/shapes.py:base", "--workdir=gs://my-bucket/base"]
OVERRIDE = [f"--config.text.path={ODD}"]
TPU_NODES = ["--accelerator=tpu-v6e-slice", "--topology=4x4", "--nodes=4", "--chips=4"]
GPU_NODES = ["--accelerator=nvidia-h100-80gb", "--nodes=2", "--chips=8"]
GKE = ["gke_jobset.sh", "--name=base", "--image=repo/imagen:1", *TRAIN]
XPK = ["xpk.sh", "--name=base", "--cluster=c", "--zone=us-central2-b", "--image=repo/imagen:1"]
SLURM = ["slurm.sh", "--gpus_per_node=8", "--time=24:00:00", *TRAIN]
CASCADE = ["cascade.sh", "--config=configs/shapes.py", "--stages=base,sr_2", "--workdir=runs/c"]
BUCKET = ["--workdir=gs://my-bucket/c", "--logs=runs/logs"]

CASES = {
    "local_processes": ["local_processes.sh", "--port=20000", "2", "echo", ODD],
    "keep_running": ["keep_running.sh", "--delay=1", "echo", ODD],
    "install_t5x": ["install_t5x.sh", "--python=py"],
    "tpu_vm_create": ["tpu_vm.sh", "create", *SLICE, *MAKE],
    "tpu_vm_create_queued": ["tpu_vm.sh", "create", *SLICE, *MAKE, "--queued", "--spot"],
    "tpu_vm_install": ["tpu_vm.sh", "install", *SLICE, "--project=p"],
    "tpu_vm_start": ["tpu_vm.sh", "start", *SLICE, *TRAIN, *OVERRIDE],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *SLICE, "--worker=3"],
    "tpu_vm_resume": ["tpu_vm.sh", "resume", *SLICE, *MAKE, *TRAIN, "--spot"],
    "tpu_vm_resume_queued": ["tpu_vm.sh", "resume", *SLICE, *MAKE, *TRAIN, "--spot", "--queued"],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *SLICE],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *SLICE],
    "tpu_vm_delete_queued": ["tpu_vm.sh", "delete", *SLICE, "--queued"],
    "gke_jobset_tpu": [*GKE, *TPU_NODES, "--spot"],
    "gke_jobset_gpu": [
        *GKE,
        *GPU_NODES,
        *OVERRIDE,
        *("--max_restarts=0", "--grace=60", "--namespace=n", "--service_account=s", "--python=py"),
    ],
    "xpk_tpu": [*XPK, *TRAIN, "--accelerator=v6e-16", "--slices=2", "--config.text.path=a b"],
    "xpk_gpu": [*XPK, *TRAIN, "--accelerator=h100-80gb-8", "--nodes=2", "--project=p"],
    "slurm": [*SLURM, *OVERRIDE],
    "slurm_all": [
        *SLURM,
        *("--partition=gpu", "--nodes=4", "--cpus_per_gpu=12", "--name=run"),
        "--sbatch=--account=lab --exclusive",
    ],
    "cascade_local": [*CASCADE, *OVERRIDE],
    "cascade_gpus": [*CASCADE, "--gpus=0,3"],
    "cascade_tpu_vm": [*CASCADE, *BUCKET, "--launcher=tpu_vm", "--zone=z", "--name=if", *OVERRIDE],
    "cascade_slurm": [*CASCADE, "--launcher=slurm", "--time=1:00:00", "--gpus_per_node=8"],
    "cascade_xpk": [*CASCADE, *BUCKET, "--launcher=xpk", "--cluster=c"],
    "cascade_gke": [*CASCADE, *BUCKET, "--launcher=gke", "--image=i", "--spot"],
}


def launch(script, *arguments, path=None, cwd=ROOT, **environment):
    """Runs a script to its end; `path` is a folder of programs to be found before all others."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=variables(path, environment), **CAPTURE
    )


CAPTURE = {"capture_output": True, "text": True, "timeout": 30}


def command(script, *arguments):
    return ["bash", f"launch/{script}", *map(str, arguments)]


def variables(path=None, extra=None):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return plain | {"PATH": f"{path or ''}:{os.environ['PATH']}"} | (extra or {})


@pytest.fixture
def tools(tmp_path):
    """A folder for stand-ins: tools(name=shell code, ...) -> the folder."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def make(**programs):
        for name, code in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{code}\n")
            (folder / name).chmod(0o755)
        return folder

    return make


@pytest.fixture
def recorder(tools, tmp_path):
    """The folder of stand-ins that only note how they were called, and `calls()` to read that."""
    notes = tmp_path / "calls"
    # In one write, as several may note something at once.
    note = f'echo "$(printf \'%s\\x1f\' "${{0##*/}}" "$@")" >>{notes}'
    names = ("gcloud", "git", "mkdir", "sbatch", "scontrol", "xpk")
    folder = tools(**dict.fromkeys(names, note), kubectl=f"{note}; cat >{notes}.stdin")

    def calls():
        text = notes.read_text() if notes.exists() else ""
        notes.unlink(missing_ok=True)
        return [line.removesuffix("\x1f").split("\x1f") for line in text.split("\n")[:-1]]

    return folder, calls


def until(condition, seconds=10):
    """Waits until the condition holds; says whether it did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def running(marker):
    """How many processes have the marker in their command line."""
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += marker.encode() in path.read_bytes()
        except OSError:  # it has just ended
            continue
    return found


# What is printed


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
    ["tpu_vm_create_queued", "tpu_vm_install", "tpu_vm_start", "tpu_vm_delete", "xpk_tpu", "slurm"],
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


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_help_names_every_option(script):
    result = launch(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"launch/{script}" in result.stdout and "set -euo" not in result.stdout
    (options,) = re.findall(r'^parse "([^"]*)"', (ROOT / "launch" / script).read_text(), re.M)
    for name in re.findall(r"\w+", options):
        assert f"--{name}" in result.stdout, name


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tpu_vm.sh"], "tpu_vm.sh: VERB is missing"),
        (["tpu_vm.sh", "stat", *SLICE], "tpu_vm.sh: stat is not a verb; there are create, "),
        (["tpu_vm.sh", "stop", "logs", *SLICE], "one verb at a time, not also logs"),
        (["tpu_vm.sh", "stop", "--zone=z"], "tpu_vm.sh stop: --name is missing; e.g. --name=base"),
        (
            ["tpu_vm.sh", "start", "--name=base", *TRAIN],
            "tpu_vm.sh start: --zone is missing; e.g. --zone=us-central2-b",
        ),
        (["tpu_vm.sh", "create", *SLICE, MAKE[1]], "tpu_vm.sh create: --accelerator is missing"),
        (["tpu_vm.sh", "resume", *SLICE, MAKE[0], *TRAIN], "resume: --runtime is missing"),
        (["tpu_vm.sh", "start", *SLICE, TRAIN[1]], "--config is missing; e.g. --config=configs/"),
        (["tpu_vm.sh", "start", *SLICE, TRAIN[0]], "--workdir is missing; e.g. --workdir=gs://"),
        (["tpu_vm.sh", "stop", "--name=Base_64", "--zone=z"], "--name=Base_64 must be a letter"),
        (["tpu_vm.sh", "stop", "--zoen=z"], "--zoen=z is not an option; there are --name --zone "),
        (["tpu_vm.sh", "stop", "--zone", "z"], "--zone needs a value: --zone=VALUE"),
        (["tpu_vm.sh", "stop", "--spot=yes"], "--spot takes no value"),
        (["tpu_vm.sh", "stop", "--config.a.b"], "--config.a.b needs a value"),
        (["tpu_vm.sh", "stop", "--config.a=1\n2"], "--config.a=1... has more than one line"),
        (["tpu_vm_worker.sh"], "install, start COMMAND..., logs or stop; not nothing"),
        ([*GKE[:2], *GKE[3:], *TPU_NODES], "gke_jobset.sh: --image is missing"),
        ([*GKE, *TPU_NODES[1:]], "--accelerator is missing"),
        ([*GKE, TPU_NODES[0], *TPU_NODES[2:]], "--topology is missing"),
        ([*GKE, *GPU_NODES, "--topology=2x2"], "--topology is for TPUs, not for nvidia-h100-80gb"),
        ([*GKE, GPU_NODES[0], "--chips=8", "--nodes=0"], "--nodes=0 must be a whole number from 1"),
        ([*GKE, *GPU_NODES, "--max_restarts=x"], "--max_restarts=x must be a whole number from 0"),
        ([*GKE, *GPU_NODES, "--template=no.yaml"], "--template=no.yaml: no such file"),
        ([*GKE, *GPU_NODES, "apply"], "apply is not an option"),
        ([*XPK, *TRAIN], "xpk.sh: --accelerator is missing"),
        ([*XPK[:2], *XPK[3:], *TRAIN], "xpk.sh: --cluster is missing"),
        ([*XPK, *TRAIN, "--accelerator=v6e-8", *OVERRIDE], "cannot carry a quote or a backslash"),
        (["slurm.sh", *SLURM[2:]], "slurm.sh: --gpus_per_node is missing"),
        ([*SLURM[:2], *TRAIN], "slurm.sh: --time is missing; e.g. --time=24:00:00"),
        ([*CASCADE[:2], CASCADE[3]], "cascade.sh: --stages is missing"),
        ([*CASCADE, "--launcher=k8s"], "--launcher=k8s must be local, tpu_vm, slurm, xpk or gke"),
        ([*CASCADE, "--zone=z"], "--zone=z is not an option of --launcher=local"),
        ([*CASCADE, "--gpus=0"], "--gpus=0 must name 2 GPUs"),
        ([*CASCADE, "--launcher=slurm", "--gpus=0,1"], "--gpus is for --launcher=local"),
        ([*CASCADE, BUCKET[0], "--launcher=xpk"], "--logs is missing"),
        (["local_processes.sh"], "COUNT, a number above 0, comes first"),
        (["local_processes.sh", "0", "true"], "COUNT, a number above 0, comes first"),
        (["local_processes.sh", "2"], "COMMAND is missing"),
        (["local_processes.sh", "--prot=1", "2", "true"], "--prot=1 is not an option; there are"),
        (["keep_running.sh", "--delay=1"], "COMMAND is missing"),
    ],
)
@pytest.mark.parametrize("dry_run", ["--dry_run", None])
def test_refused(arguments, says, dry_run, recorder):
    folder, calls = recorder
    script, *rest = arguments
    result = launch(script, *filter(None, [dry_run]), *rest, path=folder)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and result.stdout == "", result
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith(script), lines
    assert calls() == []


def test_shellcheck_has_nothing_to_say():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    paths = [ROOT / "launch" / name for name in SCRIPTS]
    result = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *paths], **CAPTURE)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


def test_scripts_are_executable():
    for name in set(SCRIPTS) - {"lib.sh", "steps.sh"}:
        assert (ROOT / "launch" / name).stat().st_mode & stat.S_IXUSR, name


# GKE


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["gke_jobset_tpu", "gke_jobset_gpu"])
def test_jobset_restarts_after_75_and_after_a_lost_machine(name):
    jobset = yaml.safe_load((SNAPSHOTS / f"{name}.txt").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_of(jobset)
    (container,) = pod["containers"]
    restarted, lost = job["podFailurePolicy"]["rules"]
    assert restarted["action"] == lost["action"] == "FailJob"
    assert restarted["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # Kubernetes refuses a podFailurePolicy with another restartPolicy; pods must not be retried.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)


def test_jobset_of_a_tpu_slice():
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_tpu.txt").read_text())
    job, pod = job_of(jobset)
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "imagen_jax", "train", *TRAIN]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    host = f"{jobset['metadata']['name']}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0"
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{host}.{jobset['metadata']['name']}:8476"
    assert env["JAX_NUM_PROCESSES"] == "4"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]


def test_jobset_of_gpu_nodes():
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_gpu.txt").read_text())
    _, pod = job_of(jobset)
    (container,) = pod["containers"]
    assert jobset["metadata"]["annotations"] == {} and jobset["metadata"]["namespace"] == "n"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (60, "s")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # $$ is how Kubernetes is told $.
    assert container["command"][0] == "py"
    assert container["command"][-1] == OVERRIDE[0].replace("$", "$$")


def test_jobset_is_applied(recorder, tmp_path):
    folder, calls = recorder
    assert launch(*CASES["gke_jobset_tpu"], path=folder).returncode == 0
    assert calls() == [["kubectl", "apply", "-f", "-"]]
    snapshot = (SNAPSHOTS / "gke_jobset_tpu.txt").read_text()
    assert (tmp_path / "calls.stdin").read_text() == snapshot


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("${IMAGE}", "fixed", "the placeholder ${IMAGE} is missing"),
        ("${IMAGE}", "${IMAGE}${IMAEG}", "nothing fills the placeholder ${IMAEG}"),
    ],
)
def test_placeholders_are_checked(old, new, says, tmp_path, recorder):
    folder, calls = recorder
    template = tmp_path / "template.yaml"
    template.write_text((ROOT / "launch/gke_jobset.yaml").read_text().replace(old, new))
    result = launch(*CASES["gke_jobset_tpu"], f"--template={template}", path=folder)
    assert result.returncode == 2 and calls() == []
    assert result.stderr == f"gke_jobset.sh: {template}: {says}\n"


def test_a_value_is_not_taken_for_a_placeholder():
    result = launch(*GKE, *GPU_NODES, "--image=${NAME}", "--dry_run")
    _, pod = job_of(yaml.safe_load(result.stdout))
    assert pod["containers"][0]["image"] == "${NAME}"


# SLURM


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_slurm_queues_again_after_75_alone(status, recorder, tools, tmp_path):
    folder, calls = recorder
    tools(srun=f"printf '%s\\n' \"$@\" >{tmp_path}/srun; exit {status}")
    job = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    result = launch("slurm_job.sh", "python", "-m", ODD, path=folder, **job)
    assert result.returncode == status
    assert calls() == ([["scontrol", "requeue", "42"]] if status == 75 else [])
    assert (tmp_path / "srun").read_text().splitlines()[-3:] == ["python", "-m", ODD]
    assert "--cpus-per-task=8" in (tmp_path / "srun").read_text()


# TPU machines


@pytest.mark.parametrize(
    ("states", "does"),
    [
        (["READY"], []),
        (["PREEMPTED", "READY"], ["delete", "create"]),
        (["", "CREATING", "READY"], ["create"]),
    ],
)
def test_resume_makes_what_is_gone(states, does, recorder, tools, tmp_path):
    folder, calls = recorder
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    record = (folder / "gcloud").read_text()
    answer = f'if [ "$4" = describe ]; then head -n 1 {tmp_path}/states; '
    answer += f"sed -i 1d {tmp_path}/states; fi"
    tools(gcloud=record + answer, sleep="exit 0")
    result = launch(*CASES["tpu_vm_resume"], path=folder)
    assert result.returncode == 0, result.stderr
    verbs = [call[4] for call in calls() if call[0] == "gcloud"]
    assert [v for v in verbs if v != "describe"] == [*does, "scp", "ssh", "ssh", "ssh"]
    assert (tmp_path / "states").read_text() == ""


def test_resume_leaves_a_failed_slice_alone(recorder, tools):
    folder, calls = recorder
    record = (folder / "gcloud").read_text()
    tools(gcloud=record + "echo FAILED")
    result = launch(*CASES["tpu_vm_resume_queued"], path=folder)
    assert result.returncode == 1 and "base is FAILED" in result.stderr
    assert [call[4] for call in calls()] == ["describe"]


@pytest.fixture
def worker(tmp_path, tools):
    """A worker of a slice of two (or as many as given): worker(verb, ...) runs its script."""
    folder = tmp_path / "imagen_jax"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")

    def run(*arguments, workers=2):
        endpoints = ",".join(f"unknown:unknown:10.0.0.{i + 7}" for i in range(workers))
        path = tools(curl=f"case $* in *agent*) echo 1 ;; *endpoints*) echo {endpoints} ;; esac")
        return launch("tpu_vm_worker.sh", *arguments, path=path, cwd=folder)

    yield run, folder
    run("stop")


def test_worker_runs_on_without_the_connection_until_stopped(worker):
    run, folder = worker
    log = folder / "train.log"
    trains = "trap 'echo saved; exit 75' TERM; env | grep ^JAX_; while :; do sleep 0.05; done"
    result = run("start", "bash", "-c", trains)
    assert result.returncode == 0 and result.stdout.startswith("worker 1: started, process ")
    assert until(lambda: "JAX_PROCESS_ID" in log.read_text())
    assert set(log.read_text().split()) == {
        "JAX_COORDINATOR_ADDRESS=10.0.0.7:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    }
    again = run("start", "true")
    assert again.returncode == 1 and "already running" in again.stderr
    assert run("stop").returncode == 0
    # It saved and ended with 75, and yet was not started again.
    assert log.read_text().splitlines()[-1] == "saved"
    assert run("stop").returncode == 0
    assert run("start", "true").returncode == 0


def test_worker_that_is_alone_is_told_of_no_others(worker):
    run, folder = worker
    run("start", "bash", "-c", "echo begins; env | grep ^JAX_; echo ends", workers=1)
    assert until(lambda: (folder / "train.log").read_text() == "begins\nends\n")


# One machine


def test_local_processes_say_who_they_are():
    says = 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS $JAX_PLATFORMS"'
    result = launch("local_processes.sh", 3, "bash", "-c", f"{says}; echo error >&2")
    assert result.returncode == 0
    lines = sorted(result.stdout.splitlines())
    address = lines[0].split()[2]
    host, port = address.split(":")
    assert host == "127.0.0.1" and 20000 <= int(port) < 32000
    assert lines == [f"[{i}] {i}/3 {address} cpu" for i in range(3)]
    assert sorted(result.stderr.splitlines()) == [f"[{i}] error" for i in range(3)]
    result = launch("local_processes.sh", 1, "bash", "-c", says, JAX_PLATFORMS="cuda")
    assert result.stdout.split()[-1] == "cuda"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("kill -KILL $$", 137),
        # The one that failed is told, not the ones that it pulled down.
        ("[ $JAX_PROCESS_ID = 2 ] && exit 9; sleep 0.2; exit 4", 9),
        ("[ $JAX_PROCESS_ID = 0 ] || exit 0; sleep 0.3; exit 5", 5),
        ("exit 75", 75),
    ],
)
def test_local_processes_exit_status(code, status):
    assert launch("local_processes.sh", 3, "bash", "-c", code).returncode == status


def test_the_others_end_when_one_fails(tmp_path):
    marker = f"{tmp_path}/marker"
    code = f"[ $JAX_PROCESS_ID = 1 ] && exit 7; : {marker}; sleep 100"
    started = time.monotonic()
    result = launch("local_processes.sh", 3, "bash", "-c", code)
    assert result.returncode == 7 and time.monotonic() - started < 10
    assert "local_processes.sh: process 1 ended with status 7\n" in result.stderr
    assert until(lambda: running(marker) == 0, seconds=2)


def test_processes_that_do_not_listen_are_killed_with_their_children(tmp_path):
    marker = f"{tmp_path}/marker"
    deaf = f"trap '' TERM; tail -f /dev/null {marker} & sleep 100"
    (tmp_path / "marker").touch()
    code = f"[ $JAX_PROCESS_ID = 1 ] && sleep 0.5 && exit 7; {deaf}"
    assert launch("local_processes.sh", "--grace=1", 3, "bash", "-c", code).returncode == 7
    assert until(lambda: running(marker) == 0, seconds=2)


def test_processes_that_save_are_not_disturbed():
    code = "[ $JAX_PROCESS_ID = 0 ] && exit 75; trap 'echo disturbed' TERM; sleep 0.5; echo saved"
    result = launch("local_processes.sh", 2, "bash", "-c", f"{code}; exit 75")
    assert (result.returncode, result.stdout) == (75, "[1] saved\n")


LISTENS = "trap 'echo got TERM; exit 75' TERM; trap 'echo got INT; exit 6' INT; echo ready; "
LISTENS += "while :; do sleep 0.05; done"


def signalled(argv, number, *, times, line="ready"):
    """Starts a command, signals it once it wrote `line` so often; (exit status, all it wrote)."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(argv, cwd=ROOT, env=variables(), **output)
    written = ""
    while written.count(line) < times:
        written += (read := process.stdout.readline())
        assert read, f"it ended before it was ready: {written}"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    return process.returncode, written + rest


@pytest.mark.parametrize(
    ("number", "says", "status"), [(signal.SIGTERM, "TERM", 75), (signal.SIGINT, "INT", 6)]
)
def test_signals_reach_all_processes_once(number, says, status):
    argv = command("local_processes.sh", 3, "bash", "-c", LISTENS)
    code, output = signalled(argv, number, times=3)
    assert code == status
    assert sorted(line for line in output.splitlines() if "got" in line) == [
        f"[{i}] got {says}" for i in range(3)
    ]


def test_keep_running_starts_again_after_75_alone(tmp_path):
    code = f"echo run >>{tmp_path}/runs; [ $(wc -l <{tmp_path}/runs) -lt 3 ] && exit 75; exit 4"
    result = launch("keep_running.sh", "--delay=0", "bash", "-c", code)
    assert result.returncode == 4
    assert (tmp_path / "runs").read_text() == "run\n" * 3
    assert result.stderr.count("status 75; starting again") == 2


@pytest.mark.parametrize(
    ("number", "says", "status"), [(signal.SIGTERM, "TERM", 75), (signal.SIGINT, "INT", 6)]
)
def test_keep_running_ends_when_asked(number, says, status):
    argv = command("keep_running.sh", "--delay=0", "bash", "-c", LISTENS)
    assert signalled(argv, number, times=1) == (status, f"ready\ngot {says}\n")


def test_keep_running_ends_when_asked_between_two_runs():
    argv = command("keep_running.sh", "--delay=60", "bash", "-c", "echo runs; exit 75")
    status, output = signalled(argv, signal.SIGTERM, times=1, line="starting again in 60 s")
    assert status == 75 and output.count("runs") == 1


# Cascades


@pytest.fixture
def python(tools, tmp_path):
    """A stand-in for Python whose training of stage x does what `python(x=shell code)` says."""

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
    # A launcher that refuses its options is a stage that failed.
    result = launch(*CASCADE, *slurm[:1], slurm[3], path=folder)
    assert result.returncode == 2 and calls() == []
    assert "--gpus_per_node is missing" in (tmp_path / "c/base.log").read_text()
