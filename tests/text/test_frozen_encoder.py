"""Encoders on a mesh: sharded, in bfloat16, never whole in host memory; and their hash."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5
from imagen_jax.text.frozen_encoder import FrozenEncoder

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "t5_hf" / "v1_1_gated_gelu_encoder"
# 51 million parameters: 203 MB as stored, 102 MB in bfloat16, the largest 17 MB as stored.
LARGE = T5Config(
    vocab_size=384, emb_dim=1024, num_layers=3, num_heads=16, head_dim=64, mlp_dim=4096
)


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory):
    """The result of tests/reference/encoder_on_mesh.py for LARGE."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / leaf.shape[0] ** 0.5,
        t5.parameter_shapes(LARGE),
    )
    hf_t5.save(folder, LARGE, params)
    result = subprocess.run(
        [sys.executable, "-m", "tests.reference.encoder_on_mesh", str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_parameters_are_sharded_and_in_bfloat16(on_mesh):
    assert on_mesh["dtypes"] == ["bfloat16"]
    assert on_mesh["bytes"] > 100e6
    assert on_mesh["bytes_per_device"] < on_mesh["bytes"] / 8 * 1.01
    assert on_mesh["rows_per_device"] == 2


def test_the_model_is_never_whole_in_a_hosts_memory_beside_the_devices(on_mesh):
    # The devices use this host's memory, too. In addition: one tensor as stored, transposed and
    # cast, and the trace of the model. The whole model as stored would be twice as much.
    assert on_mesh["bytes"] < on_mesh["grown"] < on_mesh["bytes"] + 100e6


def test_vectors_do_not_depend_on_the_mesh(on_mesh):
    # Order of the sums, rounded to bfloat16.
    assert on_mesh["scale"] > 0.01
    assert on_mesh["error"] < 0.1 * on_mesh["scale"]


class Letters:
    """A vocabulary small enough for the golden encoders."""

    size, start, end = 128, (), 1

    def __call__(self, caption: str) -> list[int]:
        return [ord(letter) % 128 for letter in caption]

    def sha256(self) -> str:
        return "letters"


def golden(dtype: str = "float32") -> FrozenEncoder:
    shape, tensors = hf_t5.open_tensors(GOLDEN)
    config = TextConfig(max_len=8, dtype=dtype)
    return FrozenEncoder("t5", shape, tensors, vocabulary=Letters(), config=config)


def test_the_hash_of_an_encoder_stays():
    """Earlier stores identify their encoder by it."""
    untouched, placed = golden(), golden()
    assert placed.params
    for encoder in (untouched, placed):
        assert encoder.fingerprint()["weights_sha256"] == (
            "a8e380ac8b7493f336443aab93d0a786c6848a11000f316974f553ab2604b5fe"
        )
    assert golden("bfloat16").fingerprint() != untouched.fingerprint()


def test_bfloat16_has_the_error_of_its_precision():
    batch = golden().tokenize(["caption", "of"])
    exact, rounded = (
        np.asarray(golden(dtype).encode(batch.ids, batch.mask))[batch.mask]
        for dtype in ("float32", "bfloat16")
    )
    error = np.sqrt(((exact - rounded) ** 2).mean() / (exact**2).mean())
    assert 1e-3 < error < 0.03
