"""40 prompts in any order, at batch 1, 7 and 64, on 1 and 8 devices: the same images."""

import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.stages.folder import write_stage

SOURCE = pathlib.Path(__file__).parents[2]
COUNT, BATCHES, ORDERS = 40, (1, 7, 64), ("given", "reversed", "shuffled")


@pytest.fixture(scope="module")
def sampled(base_config, sr_config, random_params, tmp_path_factory):
    """(devices, batch, order) -> images, and the same with "noise" -> noise."""
    root, rng = tmp_path_factory.mktemp("same"), np.random.default_rng(0)
    for config in (base_config, sr_config):
        write_stage(root / config.name, random_params(config), config, {})
    emb = rng.normal(size=(COUNT, 4, 8)).astype(np.float32)
    np.savez(root / "texts", text_emb=emb, text_mask=np.arange(4) < rng.integers(1, 5, (COUNT, 1)))
    found = {}
    for devices in (1, 8):
        out = root / f"sampled_{devices}.npz"
        script = SOURCE / "tests" / "reference" / "same_images.py"
        flags = f"--xla_force_host_platform_device_count={devices}"
        subprocess.run(
            [sys.executable, script, f"{root}/base,{root}/sr", root / "texts.npz", out],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(SOURCE)},
            check=True,
            timeout=600,
        )
        with np.load(out) as arrays:
            for batch, order in itertools.product(BATCHES, ORDERS):
                found[devices, batch, order] = arrays[f"{batch}_{order}"]
                found[devices, batch, order, "noise"] = arrays[f"noise_{batch}_{order}"]
    return found


@pytest.mark.slow
def test_noise_is_bit_equal_everywhere(sampled):
    noise = [array for key, array in sampled.items() if key[-1] == "noise"]
    assert len(noise) == 18 and noise[0].shape[0] == COUNT
    assert len(np.unique(noise[0].reshape(COUNT, -1), axis=0)) == COUNT
    for other in noise[1:]:
        np.testing.assert_array_equal(other, noise[0])


@pytest.mark.slow
def test_images_are_within_a_level_and_at_equal_batch_size_bit_equal(sampled):
    images = {key: array for key, array in sampled.items() if key[-1] != "noise"}
    first = images[1, 1, "given"]
    assert first.std() > 10
    for (devices, batch, _), other in images.items():
        assert np.abs(other.astype(int) - first.astype(int)).max() <= 1
        np.testing.assert_array_equal(other, images[devices, batch, "given"])
