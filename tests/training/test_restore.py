"""Restores: processes agree, errors that pass are retried, damage renames, one replica reads."""

import errno
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from imagen_jax.parallel import replicas
from imagen_jax.training import restore
from tests.reference.processes import ROOT, finish, start

PROBE = ROOT / "tests" / "reference" / "restore_probe.py"


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> list[dict]:
    """What two processes of two devices each got in every scenario."""
    folder = tmp_path_factory.mktemp("restored")
    finish(start([sys.executable, PROBE, folder / "run", folder / "out"], 2, 2))
    return [json.loads(pathlib.Path(f"{folder}/out.{i}.json").read_text()) for i in range(2)]


def test_both_processes_restore_the_newest(restored):
    for found in restored:
        assert (found["whole"]["step"], found["whole"]["same"]) == (6, True)
        assert found["whole"]["lines"] == found["whole"]["retried"] == []
        assert found["average"]


def test_an_error_in_one_process_is_retried(restored):
    assert [found["one error"]["step"] for found in restored] == [6, 6]
    assert all(found["one error"]["same"] for found in restored)
    assert [len(found["one error"]["retried"]) for found in restored] == [0, 1]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("one machine", "UnreachableError", "Input/output error) in 6 tries; nothing was changed"),
        ("one machine, damaged", "UnreachableError", "the first process can read it"),
        ("memory", "MemoryExhaustedError", "does not fit into memory"),
    ],
)
def test_all_processes_stop_where_one_cannot_read(restored, name, error, says):
    """With the same line; nothing is renamed, so step 6 is restored by the scenarios after it."""
    first, second = (found[name] for found in restored)
    assert first["error"] == second["error"] == error
    assert first["text"] == second["text"] and says in first["text"] and "6 on" in first["text"]
    assert restored[0]["replicas"]["step"] == 6


def test_one_replica_reads_for_all(restored):
    """Bit for bit, with -0.0 and NaN; counted by tensorstore's opened files."""
    for found in restored:
        for name in ("replicas", "each reads"):
            assert (found[name]["step"], found[name]["same"]) == (6, True)
    opened = [[found[name]["opened"] for found in restored] for name in ("replicas", "each reads")]
    (reader, other), (one, two) = opened
    # The first process looks into the checkpoint beforehand.
    assert reader == one > 0 and two > 0 and other == 0


def test_a_damaged_checkpoint_is_left_by_both_processes(restored):
    for found in restored:
        assert (found["damaged"]["step"], found["damaged"]["same"]) == (4, True)
        assert len(found["damaged"]["lines"]) == 1
        assert "falling back to the previous" in found["damaged"]["lines"][0]
        assert found["folders"] == ["2", "4", "6.broken"]


def by_orbax(cause: Exception) -> Exception:
    """What Orbax raises for an error of tensorstore."""
    error = Exception("Encountered error while reading array index: (slice(0, 8, 1),).")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (by_orbax(ValueError("[OS error 5: EIO Input/output error]")), restore.UnreachableError),
        (by_orbax(ValueError("DATA_LOSS: invalid zstd frame")), restore.DamagedError),
        (OSError(errno.EIO, "Input/output error"), restore.UnreachableError),
        (OSError(errno.ESTALE, "Stale file handle"), restore.UnreachableError),
        (ValueError("UNAVAILABLE: CURL error[7]"), restore.UnreachableError),
        (ValueError("INTERNAL: [OS error 5: EIO Input/output error]"), restore.UnreachableError),
        (ValueError("HTTP response code: 503"), restore.UnreachableError),
        (FileNotFoundError(errno.ENOENT, "No such file"), restore.DamagedError),
        (ValueError("DATA_LOSS: checksum mismatch"), restore.DamagedError),
        (json.JSONDecodeError("Expecting value", "", 0), restore.DamagedError),
        (MemoryError(), restore.MemoryExhaustedError),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), restore.MemoryExhaustedError),
    ],
)
def test_what_an_error_says_about_a_checkpoint(error, kind):
    assert restore.kind_of(error) is kind


@pytest.mark.parametrize(
    ("processes", "shape", "count"),
    [
        ([0, 0, 1, 1], (4, 1, 1), 2),
        ([0, 1, 2, 3], (4, 1, 1), 4),
        ([0, 0, 1, 1], (2, 2, 1), 2),
        ([0, 1, 0, 1], (2, 2, 1), 1),
        ([0, 1, 1, 0], (4, 1, 1), 1),
        ([0, 0, 1, 1, 2, 2, 3, 3], (4, 1, 2), 4),
    ],
)
def test_a_process_is_in_one_replica(processes, shape, count):
    assert replicas.count_replicas(np.array(processes).reshape(shape)) == count


def test_one_process_is_one_replica():
    mesh = Mesh(np.asarray(jax.devices())[:, None, None], ("data", "fsdp", "tensor"))
    assert replicas.replica_mesh(mesh).shape["replica"] == 1
