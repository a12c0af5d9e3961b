"""launch/tpu_vm.sh, and launch/tpu_vm_worker.sh on each worker of a slice."""

import pytest

from tests.reference.launch import CASES, ROOT, launch, until


@pytest.mark.parametrize(
    ("states", "does"),
    [
        (["READY"], []),
        (["PREEMPTED", "READY"], ["delete", "create"]),
        (["", "CREATING", "READY"], ["create"]),
    ],
)
def test_resume_creates_a_missing_slice(states, does, recorder, tools, tmp_path):
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


def test_worker_continues_without_the_connection_until_stopped(worker):
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
    # It saved and ended with 75, and was not restarted.
    assert log.read_text().splitlines()[-1] == "saved"
    assert run("stop").returncode == 0
    assert run("start", "true").returncode == 0


def test_a_single_worker_gets_no_coordinator(worker):
    run, folder = worker
    run("start", "bash", "-c", "echo begins; env | grep ^JAX_; echo ends", workers=1)
    assert until(lambda: (folder / "train.log").read_text() == "begins\nends\n")


def test_prepare_and_embed_run_in_the_foreground_of_one_worker_each(worker):
    run, folder = worker
    found = {
        verb: run(verb, "bash", "-c", "env | grep ^JAX_; exit 3") for verb in ("prepare", "embed")
    }
    assert found["prepare"].stdout == "JAX_PLATFORMS=cpu\n"
    assert found["embed"].stdout == ""  # It joins no other worker.
    assert {result.returncode for result in found.values()} == {3}
    assert not (folder / "train.pid").exists()
