"""Several processes with data, embeddings and workdir in a bucket equal one process on a disk."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest

from imagen_jax.io import buckets, mirrors
from imagen_jax.parallel.preemption import RESTART
from tests import object_stores
from tests.reference.processes import finish
from tests.training.test_many_processes import LOSS_TOLERANCE, rows, start

pytestmark = pytest.mark.slow


def losses(lines: list[dict]) -> list[float]:
    return [row["loss"] for row in lines]


def stop_when(step: int, started) -> list[int]:
    """Sends SIGTERM to all processes once the first has reported a step; their exit codes."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        files = [file for file in mirrors.home().glob("*/metrics.jsonl") if file.exists()]
        if any(file.read_text().count("\n") >= step for file in files):
            break
        assert all(process.poll() is None for process in started), started[0].communicate()[0]
        time.sleep(0.05)
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        process.communicate(timeout=600)
    return [process.returncode for process in started]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_four_processes_then_two(scheme, base_config, write_world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = write_world(tmp_path, base_config, steps=30, every=10)
    finish(start(1, 1, world, tmp_path / "alone"))
    with object_stores.running(scheme, latency=0.01, faults=0.02) as proxy:
        root = f"{scheme}://{object_stores.BUCKET}/run"
        for name in ("images", "embeddings"):
            for file in (tmp_path / name).rglob("*"):
                if file.is_file() and file.relative_to(tmp_path / name).parts[0][0] != ".":
                    path = file.relative_to(tmp_path).as_posix()
                    buckets.write(buckets.join(root, path), file.read_bytes())
        run = (
            f"--config.data.path={root}/images",
            f"--config.data.embeddings={root}/embeddings",
            "--config.mesh.data=1",
        )
        workdir = pathlib.Path("x")  # Replaced: --workdir takes the last value.
        flags = (*run, f"--workdir={root}/workdir")
        codes = stop_when(12, start(4, 1, world, workdir, *flags, "--config.mesh.fsdp=4"))
        assert codes == [RESTART] * 4
        lists = [n for n in buckets.names(f"{root}/workdir/checkpoints") if n.endswith("3.json")]
        assert lists  # The fourth process has written its shards.
        output = finish(start(2, 2, world, workdir, *flags, "--config.mesh.fsdp=4"))
        assert "going on from step" in output
        lines = buckets.read(f"{root}/workdir/metrics.jsonl").data.decode().splitlines()
        assert proxy.failed
    found, expected = [json.loads(line) for line in lines], rows(tmp_path / "alone")
    assert [row["step"] for row in found] == list(range(1, 31))
    np.testing.assert_allclose(losses(found), losses(expected), rtol=LOSS_TOLERANCE, atol=1e-6)
