"""launch/local_processes.sh and keep_running.sh: several processes of a run, and restarts."""

import pathlib
import signal
import subprocess
import time

import pytest

from tests.reference.launch import ROOT, command, launch, until, variables


def running(marker):
    """Number of processes with the marker in their command line."""
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += marker.encode() in path.read_bytes()
        except OSError:  # the process has just ended
            continue
    return found


def test_local_processes_prefix_their_lines():
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
        # The process that failed is reported, not those that ended because of it.
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


def test_processes_that_ignore_sigterm_are_killed_with_their_children(tmp_path):
    marker = f"{tmp_path}/marker"
    deaf = f"trap '' TERM; tail -f /dev/null {marker} & sleep 100"
    (tmp_path / "marker").touch()
    code = f"[ $JAX_PROCESS_ID = 1 ] && sleep 0.5 && exit 7; {deaf}"
    assert launch("local_processes.sh", "--grace=1", 3, "bash", "-c", code).returncode == 7
    assert until(lambda: running(marker) == 0, seconds=2)


def test_processes_that_save_get_no_signal():
    code = "[ $JAX_PROCESS_ID = 0 ] && exit 75; trap 'echo disturbed' TERM; sleep 0.5; echo saved"
    result = launch("local_processes.sh", 2, "bash", "-c", f"{code}; exit 75")
    assert (result.returncode, result.stdout) == (75, "[1] saved\n")


LISTENS = "trap 'echo got TERM; exit 75' TERM; trap 'echo got INT; exit 6' INT; echo ready; "
LISTENS += "while :; do sleep 0.05; done"


def signalled(argv, number, *, times, line="ready"):
    """Starts a command, signals it after some outputs of `line`; returns (exit status, output)."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Tests in the background of a shell ignore SIGINT, and bash cannot undo that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(argv, cwd=ROOT, env=variables(), **output, **heard)
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


@pytest.mark.parametrize(("end", "status"), [("exit 75", 75), ("kill -KILL $$", 137)])
def test_keep_running_restarts_after_75_and_signals(end, status, tmp_path):
    code = f"echo run >>{tmp_path}/runs; [ $(wc -l <{tmp_path}/runs) -lt 3 ] && {end}; exit 4"
    result = launch("keep_running.sh", "--delay=0", "bash", "-c", code)
    assert result.returncode == 4
    assert (tmp_path / "runs").read_text() == "run\n" * 3
    assert result.stderr.count(f"status {status}; starting again") == 2


@pytest.mark.parametrize(("delay", "waits"), [(4, ["4", "8", "16"]), (200, ["200", "300"])])
def test_keep_running_has_a_limit_and_waits_longer_each_time(delay, waits, tmp_path):
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    options = (f"--delay={delay}", f"--max_restarts={len(waits)}")
    code = f"echo run >>{tmp_path}/runs; exit 75"
    result = launch("keep_running.sh", *options, "bash", "-c", code, path=tmp_path)
    assert result.returncode == 75
    assert (tmp_path / "runs").read_text() == "run\n" * (len(waits) + 1)
    lines = result.stderr.splitlines()
    assert [line.split()[-2] for line in lines[:-1]] == waits
    assert lines[-1] == f"keep_running.sh: status 75 after --max_restarts={len(waits)} short runs"


@pytest.mark.parametrize(
    ("number", "says", "status"), [(signal.SIGTERM, "TERM", 75), (signal.SIGINT, "INT", 6)]
)
def test_keep_running_ends_on_a_signal(number, says, status):
    argv = command("keep_running.sh", "--delay=0", "bash", "-c", LISTENS)
    assert signalled(argv, number, times=1) == (status, f"ready\ngot {says}\n")


def test_keep_running_ends_on_a_signal_between_two_runs():
    argv = command("keep_running.sh", "--delay=60", "bash", "-c", "echo runs; exit 75")
    status, output = signalled(argv, signal.SIGTERM, times=1, line="starting again in 60 s")
    assert status == 75 and output.count("runs") == 1
