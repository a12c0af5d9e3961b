"""Two runs, one after the other, in one workdir of a bucket: neither loses the other's files."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from imagen_jax.config.schema import CheckpointConfig, TrainConfig
from imagen_jax.io import buckets
from imagen_jax.training import ownership, workdirs
from imagen_jax.training.ownership import Ownership, OwnershipError, owned
from imagen_jax.training.train import train
from tests import object_stores
from tests.reference.launch import until

RUN = "gs://bucket/runs/one"


@pytest.fixture(autouse=True)
def stores(tmp_path, monkeypatch):
    """A store in memory; every owner seems to be on another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers = itertools.count()
    monkeypatch.setattr(ownership, "_machine", lambda: f"machine {next(numbers)}")
    monkeypatch.setattr(ownership, "DEAD_AFTER", 0.3)
    with object_stores.in_memory():
        yield


def add(workdir: str, *steps: int) -> None:
    with (pathlib.Path(workdir) / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def steps_of(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def in_bucket() -> list[int]:
    return steps_of(buckets.read(f"{RUN}/metrics.jsonl").data.decode())


def test_a_run_goes_on_from_what_its_predecessor_wrote_last():
    """Both have the workdir open before the first one ends, as where a run is replaced."""
    with workdirs.opened(RUN, write=True) as first:
        with owned(first, print):
            add(first, 1, 2)
            workdirs.publish(first)
            second_open = workdirs.opened(RUN, write=True)
            second = second_open.__enter__()
            add(first, 3, 4)
            (pathlib.Path(first) / "rollbacks.json").write_text("[]")
        assert in_bucket() == [1, 2, 3, 4]  # Before it is free for others.
    with owned(second, print):
        assert steps_of((pathlib.Path(second) / "metrics.jsonl").read_text()) == [1, 2, 3, 4]
        assert (pathlib.Path(second) / "rollbacks.json").exists()
        add(second, 5)
    second_open.__exit__(None, None, None)
    assert in_bucket() == [1, 2, 3, 4, 5]


def test_a_run_that_was_replaced_writes_nothing_more(monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT", 100.0)  # It stands still.
    with workdirs.opened(RUN, write=True) as first:
        with pytest.raises(OwnershipError), owned(first, print) as check:
            add(first, 1, 2)
            workdirs.publish(first)
            with workdirs.opened(RUN, write=True) as second, owned(second, lambda line: None):
                add(second, 3, 4, 5, 6)
            add(first, 3)
            with pytest.raises(OwnershipError):
                workdirs.publish(first)  # As before the commit of a checkpoint.
            check()
        add(first, 4)
    assert in_bucket() == [1, 2, 3, 4, 5, 6]


def test_a_refused_run_writes_nothing(monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    monkeypatch.setattr(ownership, "DEAD_AFTER", 20.0)  # Also on a busy machine.
    with workdirs.opened(RUN, write=True) as first, owned(first, print):
        add(first, 1)
        workdirs.publish(first)
        with workdirs.opened(RUN, write=True) as second:
            add(second, 7)
            with pytest.raises(OwnershipError), owned(second, lambda line: None):
                pass
        assert in_bucket() == [1]


def test_a_last_write_that_fails_is_an_error(monkeypatch):
    with (
        workdirs.opened(RUN, write=True) as workdir,
        pytest.raises(buckets.BucketError, match="no answer"),
        owned(workdir, print),
    ):
        add(workdir, 1)

        def fail(*_, **__):
            raise buckets.BucketError("no answer")

        monkeypatch.setattr(buckets, "write", fail)


def test_a_run_that_was_replaced_deletes_no_checkpoint(base_config, make_batch):
    """It stands still at step 4, has to roll back then, and must not delete its successor's."""
    config = dataclasses.replace(
        base_config,
        train=TrainConfig(steps=12, log_every=1, nan_patience=1, rollbacks=2),
        checkpoint=CheckpointConfig(every=2, keep=10),
    )

    def saved() -> list[str]:
        names = buckets.names(f"{RUN}/checkpoints")
        return sorted({name.split("/")[0] for name in names if name.endswith("commit.json")})

    with workdirs.opened(RUN, write=True) as workdir:
        other = Ownership(workdir)
        record = dataclasses.replace(other._record, host="elsewhere", process=7, heartbeat="now")

        def batches(start: int):
            for step in itertools.count(start):
                batch = make_batch(config, seed=step)
                if step == 4:
                    assert until(lambda: saved()[-1:] == ["4"])
                    text = json.dumps(dataclasses.asdict(record)).encode()
                    buckets.write(f"{RUN}/owner/owner.1.json", text)
                    for later in ("6", "8"):
                        for name in buckets.names(f"{RUN}/checkpoints/4"):
                            data = buckets.read(f"{RUN}/checkpoints/4/{name}").data
                            buckets.write(f"{RUN}/checkpoints/{later}/{name}", data)
                    batch["image"] = np.full_like(batch["image"], np.nan)
                yield batch

        with pytest.raises(OwnershipError, match="taken over by another run .process 7"):
            train(config, workdir, batches, lambda line: None)
    assert saved() == ["2", "4", "6", "8"]
