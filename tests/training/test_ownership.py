"""One run per workdir: refused beside a live owner, taken over from a dead one."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from imagen_jax.config.schema import CheckpointConfig, TrainConfig
from imagen_jax.io import mirrors
from imagen_jax.training import ownership
from imagen_jax.training.ownership import Ownership, OwnershipError
from imagen_jax.training.train import train
from tests import object_stores
from tests.reference.processes import ROOT

HOLD = """
import sys, time
from imagen_jax.training.ownership import Ownership
owner = Ownership(sys.argv[1])
owner.acquire()
print("acquired", flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    monkeypatch.setattr(ownership, "DEAD_AFTER", 0.5)


@pytest.fixture
def elsewhere(monkeypatch):
    """From here on, owners seem to be on another machine: processes cannot be looked up."""
    numbers = iter(range(100))
    monkeypatch.setattr(ownership, "_machine", lambda: f"machine {next(numbers)}")


def hold(workdir: pathlib.Path) -> subprocess.Popen:
    """A process that owns the workdir."""
    started = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout and started.stdout.readline() == "acquired\n"
    return started


def records(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in workdir.glob("owner.*"))


def test_a_second_run_is_refused_and_a_killed_owner_replaced(tmp_path):
    started = hold(tmp_path)
    record = json.loads((tmp_path / "owner.0.json").read_text())
    with pytest.raises(OwnershipError) as refused:
        Ownership(str(tmp_path)).acquire()
    for part in (f"process {started.pid} on {record['host']}", record["heartbeat"], "workdir="):
        assert part in str(refused.value)
    started.send_signal(signal.SIGSTOP)  # Suspended is not dead.
    with pytest.raises(OwnershipError):
        Ownership(str(tmp_path)).acquire()
    started.kill()
    time.sleep(0.2)  # Not waited for: a zombie is dead.
    begun = time.monotonic()
    owner = Ownership(str(tmp_path))
    owner.acquire()
    # The process is gone, which is seen at once on its own machine.
    assert time.monotonic() - begun < ownership.DEAD_AFTER
    owner.check()
    assert records(tmp_path) == ["owner.1.json"]
    owner.release()
    started.communicate()


def test_an_id_that_another_process_uses_is_not_the_owner(tmp_path):
    owner = Ownership(str(tmp_path))
    record = dataclasses.replace(owner._record, process=os.getppid(), started=1, token="old")
    (tmp_path / "owner.3.json").write_text(json.dumps(dataclasses.asdict(record)))
    owner.acquire()
    assert records(tmp_path) == ["owner.4.json"]
    owner.release()


def test_an_owner_elsewhere_is_known_by_its_heartbeat(tmp_path, elsewhere):
    first, lines = Ownership(str(tmp_path)), []
    first.acquire()
    with pytest.raises(OwnershipError, match="last heartbeat"):
        Ownership(str(tmp_path), lines.append).acquire()
    assert len(lines) == 1 and "waiting up to 0.5 s for a heartbeat" in lines[0]
    first._stop.set()  # As if its machine were lost.
    first._thread.join()
    second, begun = Ownership(str(tmp_path)), time.monotonic()
    second.acquire()
    assert time.monotonic() - begun >= ownership.DEAD_AFTER
    with pytest.raises(OwnershipError, match="taken over by another run"):
        first.check()
    first.release()
    second.check()
    second.release()
    third, begun = Ownership(str(tmp_path)), time.monotonic()
    third.acquire()  # Released: no waiting.
    assert time.monotonic() - begun < ownership.DEAD_AFTER
    third.release()


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    """() -> a workdir as one of several machines sees it."""
    if request.param == "disk":
        yield lambda: str(tmp_path)
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numbers = iter(range(100))
    with object_stores.in_memory():
        yield lambda: str(mirrors.folder("gs://bucket/run", str(next(numbers))))


def test_one_of_many_that_start_at_once_owns(workdir, elsewhere, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_AFTER", 20.0)  # Also on a busy machine.
    contenders = [Ownership(workdir(), lambda line: None) for _ in range(8)]
    won, barrier = [], threading.Barrier(len(contenders))

    def go(contender):
        barrier.wait()
        try:
            contender.acquire()
            won.append(contender)
        except OwnershipError:
            pass

    threads = [threading.Thread(target=go, args=(contender,)) for contender in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_an_owner_that_cannot_be_looked_up_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    """Other users' processes may be hidden; and a record of another version has other fields."""
    monkeypatch.setattr(ownership, "DEAD_AFTER", 20.0)  # Also on a busy machine.
    first = Ownership(str(tmp_path))
    first.acquire()
    read = pathlib.Path.read_text

    def hidden(path, *args, **kwargs):
        if str(path).startswith("/proc/") and path.name == "stat":
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", hidden)
    with pytest.raises(OwnershipError):
        Ownership(str(tmp_path), lambda line: None).acquire()
    text = first._text
    monkeypatch.setattr(first, "_text", lambda **f: text(**f).replace('"started"', '"begun"'))
    time.sleep(4 * ownership.HEARTBEAT)
    with pytest.raises(OwnershipError):
        Ownership(str(tmp_path), lambda line: None).acquire()
    assert records(tmp_path) == ["owner.0.json"]
    first.release()


def test_a_run_that_stood_still_while_others_owned_is_refused(workdir, elsewhere, monkeypatch):
    """It has seen no record, and its number is free again once a later owner has removed it."""
    monkeypatch.setattr(ownership, "DEAD_AFTER", 20.0)  # Also on a busy machine.
    slow, others = Ownership(workdir(), lambda line: None), []
    create = slow._create

    def late(number):
        if not others:
            for _ in range(2):
                others.append(Ownership(workdir(), lambda line: None))
                others[-1].acquire()
                if len(others) == 1:
                    others[0].release()
        return create(number)

    monkeypatch.setattr(slow, "_create", late)
    with pytest.raises(OwnershipError, match="belongs to a run"):
        slow.acquire()
    others[1].check()
    assert others[1]._numbers() == [1]
    others[1].release()


def test_removed_records_are_written_again(tmp_path):
    owner = Ownership(str(tmp_path))
    owner.acquire()
    (tmp_path / "owner.0.json").unlink()
    owner.check()
    assert records(tmp_path) == ["owner.0.json"]
    owner.release()


def test_a_run_stops_before_it_saves_what_another_one_owns(base_config, make_batch, tmp_path):
    config = dataclasses.replace(
        base_config, train=TrainConfig(steps=6, log_every=1), checkpoint=CheckpointConfig(every=2)
    )
    other = Ownership(str(tmp_path))
    record = dataclasses.replace(other._record, host="elsewhere", process=7, heartbeat="now")

    def batches(start: int):
        for step in range(start, 100):
            if step == 3:
                (tmp_path / "owner.1.json").write_text(json.dumps(dataclasses.asdict(record)))
            yield make_batch(config, seed=step)

    with pytest.raises(OwnershipError, match="taken over by another run .process 7 on elsewhere"):
        train(config, str(tmp_path), batches, lambda line: None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
def test_two_runs_in_one_workdir(base_config, write_world, tmp_path):
    """The second one exits with 1 and one line; the first one ends as if alone."""
    config = write_world(tmp_path, base_config, steps=400, every=50)
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={config}"]
    command.append(f"--workdir={tmp_path / 'run'}")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    refused = subprocess.run(
        [*command, "--config.seed=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert first.poll() is None, "the first run ended too early for this test"
    assert refused.returncode == 1 and f"process {first.pid} on" in refused.stderr
    first.kill()
    first.wait()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == list(range(1, 401))
