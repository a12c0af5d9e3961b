"""Hangs and lost peers end a process with status 75; logs are written line by line."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.parallel.preemption import RESTART
from imagen_jax.training import watchdog
from imagen_jax.training.ownership import OwnershipError
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.watchdog import Watchdog, is_lost_peer, restartable
from tests.reference.launch import until
from tests.reference.processes import start

SOURCE = pathlib.Path(__file__).parents[2]
GLOO = "UNKNOWN: Gloo all-reduce failed: [tcp/pair.cc:547] Connection closed by peer"


def ended_by(tmp_path, timeout: float):
    """A watchdog and the statuses with which it would have ended the process."""
    statuses: list[int] = []
    return Watchdog(str(tmp_path), timeout, statuses.append), statuses


def waits_for_a_collective(event: threading.Event) -> None:
    event.wait()


def test_a_hang_writes_the_stacks_of_all_threads(tmp_path, capfd):
    dog, statuses = ended_by(tmp_path, 0.3)
    event = threading.Event()
    thread = threading.Thread(target=waits_for_a_collective, args=(event,))
    thread.start()
    with dog:
        dog.completed(41)
        assert until(lambda: statuses, seconds=5)
    event.set()
    thread.join()
    assert statuses == [RESTART]
    (path,) = (tmp_path / "hangs").iterdir()
    log = capfd.readouterr().err
    for text in (path.read_text(), log):
        assert "in waits_for_a_collective" in text and "in test_a_hang_writes" in text
    assert "no completed step for 0.3 s, the last is step 41" in log and str(path) in log


def test_steps_and_the_end_of_the_run_keep_it_quiet(tmp_path):
    dog, statuses = ended_by(tmp_path, 0.4)
    with dog:
        for step in range(8):
            time.sleep(0.1)
            dog.completed(step)
    time.sleep(0.6)
    assert statuses == [] and not (tmp_path / "hangs").exists()
    with ended_by(tmp_path, 0.0)[0]:
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("error", "cause", "lost"),
    [
        (ValueError(GLOO), None, True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy"), None, True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), None, False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), None, False),
        (CheckpointError("cannot save"), ValueError(GLOO), True),
        (
            CheckpointError("cannot save"),
            RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"),
            True,
        ),
        (CheckpointError("cannot save"), ValueError("UNAVAILABLE: gs://b: HTTP 503"), False),
        (CheckpointError("cannot save"), OSError("No space left on device"), False),
        (CheckpointError("no heartbeat since 1 s"), None, False),
        (OwnershipError("taken over by process 7 on a, last heartbeat 12:00"), None, False),
        (ConfigError("config.train.heartbeat_timeout=-1 must be positive"), None, False),
        (TypeError("a fault of the program"), None, False),
    ],
)
def test_which_errors_report_a_lost_peer(error, cause, lost, tmp_path, monkeypatch):
    error.__cause__ = cause
    assert is_lost_peer(error) is lost
    for joined in (False, True):
        monkeypatch.setattr(watchdog.distributed, "is_joined", lambda joined=joined: joined)
        dog, statuses = ended_by(tmp_path, 0.0)
        for context in (dog, restartable(statuses.append)):
            with pytest.raises(type(error)), context:
                raise error
        assert statuses == ([RESTART] * 2 if lost and joined else [])


def train(config, workdir, *more):
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    return [*command, f"--workdir={workdir}", *more]


def reached(workdir, step: int) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_peer_ends_the_others_restartably(
    number, base_config, write_world, tmp_path
):
    config = write_world(tmp_path, base_config, steps=10**6, every=10**6)
    # Longer than the compilation of the step by three processes on one busy core.
    hang = 240
    flags = [f"--config.train.hang_timeout={hang}", "--config.train.heartbeat_timeout=900"]
    flags.append("--config.data.batch_size=3")
    started = start(train(config, tmp_path / "run", *flags), 3, 1)
    assert until(lambda: reached(tmp_path / "run", 3), seconds=600)
    started[1].send_signal(number)
    others = [started[0], started[2]]
    assert [process.wait(timeout=hang + 120) for process in others] == [RESTART] * 2
    started[1].kill()
    logs = [process.communicate()[0] for process in others]
    if number == signal.SIGSTOP:
        assert all(f"no completed step for {hang} s" in log and "Thread 0x" in log for log in logs)
        assert len(list((tmp_path / "run" / "hangs").iterdir())) == 2
    else:
        assert all("another process of the run is lost" in log for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["start", "devices", "ownership", "exchange"])
def test_a_peer_that_dies_before_the_first_step(place, base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=10**6, every=10**6)
    script = [sys.executable, SOURCE / "tests" / "reference" / "dying_peer.py", place, "train"]
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    heartbeat = 200 if place == "exchange" else 20
    flags += [f"--config.train.heartbeat_timeout={heartbeat}", "--config.data.batch_size=3"]
    started = start([*script, *flags], 3, 1)
    logs = [process.communicate(timeout=150)[0] for process in started]
    # Both are restartable; JAX itself aborts when a heartbeat is missing.
    status = RESTART if place == "exchange" else -signal.SIGABRT
    ended = [process.returncode for process in started]
    assert ended == [status, status, -signal.SIGKILL], logs
    if place == "exchange":
        assert all("another process of the run is lost" in log for log in logs[:2])
        assert not any("Traceback" in log for log in logs)


def test_lines_reach_a_log_file_at_once(tmp_path):
    """Without PYTHONUNBUFFERED, as under nohup or SLURM."""
    code = """
import time
from imagen_jax.cli import configs, main
configs.run = lambda flags: (print("step 1"), time.sleep(60))
main.main(["configs"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log)
    try:
        assert until(lambda: (tmp_path / "log").read_text() == "step 1\n", seconds=20)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_progress_lines_reach_a_log_file_within_a_second(base_config, write_world, tmp_path):
    config = write_world(tmp_path, base_config, steps=10**6, every=10**6)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            train(config, tmp_path / "run"), cwd=SOURCE, env=environment, stdout=log
        )
    try:
        assert until(lambda: reached(tmp_path / "run", 5), seconds=120)
        assert until(lambda: "step 5/" in (tmp_path / "log").read_text(), seconds=1)
    finally:
        process.kill()
        process.wait()
