"""Plans for GPUs of a machine without one, through JAX's CUDA plugin."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.parallel import gpu_targets, peaks, topology

ROOT = pathlib.Path(__file__).parents[2]


def test_names_of_gpus():
    assert gpu_targets.is_gpu("h200-8") and not gpu_targets.is_gpu("v5e-8")
    for name in ("h200", "h200-3", "h100-many", "h200-8x2"):
        with pytest.raises(ConfigError, match="a machine has 1, 2, 4, 8 of h[12]00; try"):
            topology.open_slice(name)
    # Plans give time and cost by the peak of each.
    assert all(peaks.peak_flops(gpu[0]) for gpu in gpu_targets.GPUS.values())


@pytest.mark.slow
@pytest.mark.parametrize(("count", "stage"), [(1, "sample"), (8, "train")])
def test_a_program_for_gpus(tmp_path, count, stage):
    pytest.importorskip("jax_plugins.xla_cuda13")
    flags = ["--config=configs/folder.py:base", f"--topology=h200-{count}", f"--stage={stage}"]
    flags += ["--config.model.text_dim=384", f"--json={tmp_path / 'plan.json'}"]
    subprocess.run(
        [sys.executable, "-m", "imagen_jax", "plan", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    memory = found["hbm_per_chip"]
    assert found["chips"] == count and found["fits"]
    assert memory["capacity"] == gpu_targets.GPUS["h200"][1]
    assert memory["arguments"] > 2 * found["params"] and memory["temporaries"] > 0
    assert bool(found["collectives"]) == (count > 1)
