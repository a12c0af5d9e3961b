"""A workdir in a bucket: the run of a disk, whole checkpoints at any moment, faults in one line."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.checks import bucket
from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.schema import CheckpointConfig, EmaConfig, TrainConfig
from imagen_jax.export.export import read_average
from imagen_jax.interop.weights import WeightsError
from imagen_jax.io import buckets, mirrors
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.preemption import RESTART, Preempted
from imagen_jax.stages import folder
from imagen_jax.training import bucket_arrays, ema_snapshots, watchdog, workdirs
from imagen_jax.training.bucket_arrays import ShardError
from imagen_jax.training.bucket_checkpoints import BucketCheckpoints
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state, first_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.teacher import add_teacher, with_teacher
from imagen_jax.training.train import train
from tests import object_stores
from tests.reference.launch import until

RUN = "gs://bucket/runs/one"


@pytest.fixture(autouse=True)
def requests(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_stores.in_memory() as counts:
        yield counts


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def train_in_bucket(config, batches, log=lambda line: None):
    with workdirs.opened(RUN, write=True) as workdir:
        return train(config, workdir, batches, log)


def test_a_preempted_and_resumed_run_is_that_of_a_disk(base_config, stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        base_config,
        train=TrainConfig(steps=6, log_every=1, sample_every=3),
        checkpoint=CheckpointConfig(every=2, keep=2),
        ema=EmaConfig(profiles=(0.1,), snapshot_every=3),
    )
    whole = train(config, str(tmp_path / "local"), stream(config), lambda line: None)

    def stop_at(target):
        return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == target else None

    with pytest.raises(Preempted, match="saved at step 4"):
        train_in_bucket(config, stream(config, event=stop_at(3)))
    same(train_in_bucket(config, stream(config)), whole)

    names = buckets.names(RUN)
    assert {n.split("/")[1] for n in names if n.startswith("checkpoints/")} == {
        "4",
        "6",
        "saved.json",
    }
    for expected in ("metrics.jsonl", "samples/step_00000003.png", "ema/3/saved.json"):
        assert expected in names
    assert any(name.startswith("tensorboard/events") for name in names)
    rows = buckets.read(f"{RUN}/metrics.jsonl").data.decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads(buckets.read(f"{RUN}/owner/owner.1.json").data)["released"]
    with workdirs.opened(RUN, write=False) as workdir:
        averages, saved, step = read_average(workdir)
        assert step == 6 and saved.train.steps == 6
        same(averages, read_average(str(tmp_path / "local"))[0])
        found = [ema_snapshots.find(path)[0] for path in (workdir, str(tmp_path / "local"))]
        assert len(found[0]) == len(found[1]) == 2
        for one, other in zip(*found, strict=True):
            same(one.load(), other.load())
    assert sorted(os.listdir(tmp_path)) == ["cache", "local"]
    left = [path.name for path in mirrors.home().iterdir()]
    assert left == []  # Every process removes its folder.


def tree(scale: float = 1.0) -> dict:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "a": {"w": jax.device_put(jnp.arange(24.0).reshape(4, 6) * scale, sharded)},
        "b": (jnp.ones((3,), jnp.bfloat16) * scale, jnp.int32(7)),
        "empty": jnp.zeros((0, 2)),
    }


def save(address: str, value: dict, token: str = "t") -> None:
    bucket_arrays.write_shards(address, 0, bucket_arrays.own_shards(value), token)
    bucket_arrays.commit(address, 1, {"tree": bucket_arrays.describe(value)}, token)


def test_arrays_come_back_whole_in_part_and_in_small_objects(monkeypatch):
    monkeypatch.setattr(bucket_arrays, "PART_BYTES", 10)
    save("s3://bucket/t", tree())
    assert len(buckets.names("s3://bucket/t")) == 4  # Two parts, the list, the commit.
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree()
    )
    same(bucket_arrays.read("s3://bucket/t", abstract), tree())
    same(bucket_arrays.read("s3://bucket/t", {"a": abstract["a"]}), {"a": tree()["a"]})
    content = bucket_arrays.read_commit("s3://bucket/t")["tree"]
    assert bucket_arrays.shapes(content)["b"]["0"].dtype == jnp.bfloat16


def test_shards_of_another_mesh_are_put_together():
    value = np.arange(48.0, dtype=np.float32).reshape(6, 8)
    parts = [((0, 0), (6, 3)), ((0, 3), (2, 5)), ((2, 3), (4, 5))]
    for number, (starts, (rows, columns)) in enumerate(parts):
        (a, b) = starts
        shard = bucket_arrays.Shard("w", [a, b], value[a : a + rows, b : b + columns].copy())
        bucket_arrays.write_shards("s3://bucket/t", number, [shard], "t")
    bucket_arrays.commit("s3://bucket/t", 3, {"tree": {}}, "t")
    read = bucket_arrays.read("s3://bucket/t", {"w": jax.ShapeDtypeStruct((6, 8), np.float32)})
    np.testing.assert_array_equal(read["w"], value)


def test_a_changed_byte_is_found():
    save("s3://bucket/t", tree())
    part = "s3://bucket/t/00000.00000.bin"
    data = bytearray(buckets.read(part).data)
    data[5] ^= 1
    buckets.write(part, bytes(data))
    with pytest.raises(ShardError, match=r"00000.bin: the checksum of a/w is wrong"):
        bucket_arrays.read("s3://bucket/t", tree())


def checkpoints(config: CheckpointConfig) -> BucketCheckpoints:
    return BucketCheckpoints(f"{RUN}/checkpoints", config, "nowhere")


def test_a_save_killed_at_any_request_leaves_whole_checkpoints(base_config, monkeypatch):
    """Every write and deletion of a save in turn is the last one that the process makes."""
    kept, write, delete = checkpoints(CheckpointConfig(keep=1)), buckets.write, buckets.delete
    allowed = 0

    def count(*_, **__):
        nonlocal allowed
        if not allowed:
            raise KeyboardInterrupt
        allowed -= 1

    def remove(addresses):
        for address in addresses:
            count()
            delete([address])

    monkeypatch.setattr(bucket_arrays, "ThreadPoolExecutor", OneThread)
    kept.save(2, tree(2.0), base_config, {})
    kept.wait_until_finished()
    for kill in range(20):
        allowed = kill
        with monkeypatch.context() as patch:
            patch.setattr(buckets, "write", lambda *a, **k: (count(), write(*a, **k))[1])
            patch.setattr(buckets, "delete", remove)
            patch.setattr("threading.excepthook", lambda _: None)
            kept.save(4, tree(4.0), base_config, {})
            kept.wait_until_finished()
        after = checkpoints(CheckpointConfig(keep=1))
        steps = after.steps()
        assert steps in ([2], [2, 4], [4])
        for step in steps:
            same(bucket_arrays.read(after.state(step), tree()), tree(float(step)))
        after.clean_up()
        assert after.steps() == steps and after._all() == set(steps)
        if allowed:
            break
        kept.delete(4)
        if 2 not in steps:
            kept.save(2, tree(2.0), base_config, {})
            kept.wait_until_finished()
    assert kill > 5 and steps == [4]


class OneThread:
    """A pool that works in the calling thread."""

    def __init__(self, count):
        """Takes the number of threads."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Waits for nothing."""

    map = staticmethod(map)


def test_which_checkpoints_are_kept(base_config):
    config = CheckpointConfig(keep=1, keep_every=4, keep_best=1, best_metric="loss")
    kept = checkpoints(config)
    for step, loss in ((2, 0.1), (4, 0.5), (6, 0.3), (8, 0.4), (10, 0.2)):
        kept.save(step, tree(), base_config, {"loss": loss})
        kept.wait_until_finished()
    assert kept.steps() == [2, 4, 8, 10]
    another = checkpoints(config)
    another.clean_up()
    another.save(12, tree(), base_config, {"loss": 0.05})
    another.wait_until_finished()
    assert another.steps() == [4, 8, 12]


def test_a_store_that_fails_is_an_error_with_the_address(base_config, stream, monkeypatch):
    config = dataclasses.replace(
        base_config,
        train=TrainConfig(steps=2, log_every=1),
        checkpoint=CheckpointConfig(every=1),
    )
    write = buckets.write

    def fail(address, *arguments, **options):
        if address.endswith(".bin"):
            raise buckets.BucketError(f"{address} cannot be used (UNAVAILABLE)")
        write(address, *arguments, **options)

    monkeypatch.setattr(buckets, "write", fail)
    with pytest.raises(CheckpointError, match=r"cannot save.*gs://bucket/runs/one/checkpoints/1/"):
        train_in_bucket(config, stream(config))
    with workdirs.opened(RUN, write=False) as workdir:
        assert Checkpoints(workdir, config.checkpoint).steps() == []


def test_doctor_writes_reads_lists_and_deletes(monkeypatch):
    monkeypatch.setattr(bucket, "PROBE_BYTES", 1000)
    status, line = bucket.check_bucket(RUN)
    assert status == "ok" and line.startswith(f"{RUN} is writable; ")
    assert buckets.names(RUN) == []
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "names", lambda address: [])
        assert bucket.check_bucket(RUN)[0] == "failed"


def test_objects_whose_names_lead_out_of_the_workdir_are_not_copied(tmp_path):
    outside = tmp_path / "outside.json"
    buckets.write(f"{RUN}/{outside}", b"{}")
    with workdirs.opened(RUN, write=False):
        assert not outside.exists()


def test_replicas_are_assembled_once(monkeypatch):
    """Each device asks for its part; those of a replicated array are the same."""
    values = jnp.arange(4.0)
    bucket_arrays.write_shards(RUN, 0, bucket_arrays.own_shards({"a": values}), "token")
    bucket_arrays.commit(RUN, 1, {}, "token")

    def two_devices(shape, sharding, part):
        whole = (slice(None),)
        assert part(whole) is part(whole)
        return jax.device_put(part(whole), sharding)

    monkeypatch.setattr(bucket_arrays.jax, "make_array_from_callback", two_devices)
    abstract = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=values.sharding)
    same(bucket_arrays.read(RUN, {"a": abstract})["a"], values)


@pytest.mark.parametrize("hangs", [False, True])
def test_the_stacks_of_a_hanging_run_are_in_the_bucket(hangs, monkeypatch):
    """Unless the store hangs, too; the process ends in any case."""
    monkeypatch.setattr(watchdog, "UPLOAD_TIMEOUT", 0.2 if hangs else 20)
    statuses: list[int] = []
    event = threading.Event()
    with workdirs.opened(RUN, write=True) as workdir:
        workdirs.begin(workdir, lambda: None)
        with monkeypatch.context() as patch:
            if hangs:
                patch.setattr(buckets, "write", lambda *_, **__: event.wait())
            with watchdog.Watchdog(workdir, 0.2, statuses.append):
                assert until(lambda: statuses)
            found = [name for name in buckets.names(RUN) if name.startswith("hangs/")]
            event.set()
        assert statuses == [RESTART] and len(found) == (not hangs)
        for name in found:
            text = buckets.read(f"{RUN}/{name}").data.decode()
            assert "in test_the_stacks_of_a_hanging_run" in text


def test_a_run_starts_from_another_run_or_a_stage_in_a_bucket(base_config, stream, tmp_path):
    first = dataclasses.replace(base_config, train=TrainConfig(steps=2))
    trained = train_in_bucket(first, stream(first))
    stage = tmp_path / "stage"
    folder.write_stage(stage, jax.device_get(trained.ema["ema"]), first, {})
    buckets.upload(stage, "s3://bucket/stage")
    optimizer = make_optimizer(first.optimizer, 2)
    create, abstract = abstract_state(first, optimizer, partitioning.make_mesh(first.mesh))
    for address in (RUN, f"{RUN}/", "s3://bucket/stage"):
        start = dataclasses.replace(first.train, init_from=address)
        config = dataclasses.replace(first, train=start)
        state = first_state(config, create, abstract, optimizer)
        same(state.params, trained.ema["ema"])
    wider = dataclasses.replace(first.model, channels=(16,))
    config = dataclasses.replace(config, model=wider)
    create, abstract = abstract_state(config, optimizer, partitioning.make_mesh(first.mesh))
    with pytest.raises(WeightsError, match="config.train.init_from=s3://bucket/stage"):
        first_state(config, create, abstract, optimizer)


def test_a_teacher_in_a_bucket(base_config, random_params, tmp_path):
    params = random_params(base_config, 1)
    folder.write_stage(tmp_path / "stage", params, base_config, {})
    buckets.upload(tmp_path / "stage", "gs://bucket/teacher")
    distill = DistillConfig("gs://bucket/teacher", 2)
    config = with_teacher(dataclasses.replace(base_config, distill=distill))
    assert config.distill.fingerprint
    with jax.set_mesh(partitioning.make_mesh(config.mesh)):
        same(add_teacher(config, lambda batch: batch)({})["teacher"], params)


def test_an_empty_file_is_copied_once_it_has_content():
    """Not before: a TensorBoard file is empty for a moment, and no start needs it so."""
    with workdirs.opened(RUN, write=True) as workdir:
        workdirs.begin(workdir, lambda: None)
        file = pathlib.Path(workdir) / "metrics.jsonl"
        for content, copied in ((b"", None), (b"x", b"x"), (b"", b"")):
            file.write_bytes(content)
            workdirs.publish(workdir)
            found = buckets.names(RUN)
            assert found == ([] if copied is None else ["metrics.jsonl"])
            assert not found or buckets.read(f"{RUN}/metrics.jsonl").data == copied
