"""Previews of a sharded run: the images of one device, without gathering parameters."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.training import preview
from tests.reference import sharded_cascade, sharded_preview

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_preview_on_a_mesh(tmp_path):
    out = tmp_path / "found"
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference.sharded_preview", str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(pathlib.Path(f"{out}.json").read_text())
    (program,) = found["programs"]
    assert program["gather"] <= found["largest_layer"]
    # A quarter of the parameters, two rows of the batch.
    assert program["arguments"] < 0.3 * found["total"]
    # Each of the eight devices samples the first of its two rows.
    rows = {name: jnp.asarray(array[::2]) for name, array in sharded_preview.batch().items()}
    params = sharded_cascade.random_tree(sharded_preview.shapes())
    expected = preview.sampled_grid(sharded_preview.config(), [params], rows)
    with np.load(f"{out}.npz") as arrays:
        grid = arrays["grid"]
    assert grid.shape == expected.shape and expected.std() > 10
    assert np.abs(grid.astype(int) - expected.astype(int)).max() <= 1


def test_a_batch_without_a_mesh_shows_its_first_images(base_config, make_batch, random_params):
    batch = jax.tree.map(jnp.asarray, make_batch(base_config))
    grid = preview.sampled_grid(base_config, [random_params(base_config)] * 2, batch)
    count = base_config.data.batch_size
    assert grid.std() > 10 and grid.shape[1] >= 64 * count
