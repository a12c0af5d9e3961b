"""A stage of 2 GB is exported and loaded with one shard and 2 GB of memory."""

import pathlib
import subprocess
import sys

import pytest

from imagen_jax.stages.folder import PARAMS_FILE
from tests.reference import export_memory
from tests.reference.processes import ROOT


def run(*arguments) -> str:
    command = [sys.executable, export_memory.__file__, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_2_gb_in_one_shard_and_2_gb(tmp_path: pathlib.Path):
    workdir, out = tmp_path / "run", tmp_path / "stage"
    run("write", workdir, out)
    for action in ("export", "load"):
        grown = int(run(action, workdir, out).splitlines()[-1].split()[0])
        assert grown < export_memory.LIMIT
    assert len(list(out.glob("params-*.safetensors"))) >= 2
    assert not (out / PARAMS_FILE).exists()
