"""Encoding during training gives the same batches and run as a store."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.cli import wiring
from imagen_jax.config import overrides as config_io
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.embeddings import embed
from imagen_jax.data.sources.registry import open_source
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training.train import train, with_data

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, base_config, write_world):
    """A configuration with an encoder and its store; captions are longer than L."""
    folder = tmp_path_factory.mktemp("world")
    path = write_world(folder, base_config, steps=4, every=2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), t5.parameter_shapes(SHAPE)
    )
    hf_t5.save(folder / "text", SHAPE, params)
    text = TextConfig(encoder="bytes", path=str(folder / "text"), max_len=11)
    config = config_io.load(str(path))
    data = dataclasses.replace(config.data, embeddings=str(folder / "real"), max_text_len=9)
    config = dataclasses.replace(config, text=text, data=data)
    source = open_source(config.data)
    captions = [caption for i in range(len(source)) for caption in source.captions(i)]
    embed.embed(captions, load_text_encoder(text), config.data.embeddings, 8, lambda line: None)
    return config


@pytest.fixture(scope="module")
def on_the_fly(stored):
    """The same configuration without a store."""
    text = dataclasses.replace(stored.text, on_the_fly=True)
    return dataclasses.replace(
        stored, text=text, data=dataclasses.replace(stored.data, embeddings="")
    )


def run(config, workdir, steps=4):
    pipeline = wiring.open_pipeline(config)
    store = pipeline.store
    config = with_data(config, store.dim, store.fingerprint, pipeline.fingerprint())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    batches = functools.partial(loaders.batches, pipeline)
    return train(config, str(workdir), batches, lambda line: None, encode=pipeline.encode)


def test_a_batch_is_what_the_store_gives(stored, on_the_fly):
    pipeline, other = wiring.open_pipeline(stored), wiring.open_pipeline(on_the_fly)
    assert pipeline.fingerprint() == other.fingerprint()
    mesh = partitioning.make_mesh(stored.mesh)
    for step in (0, 3):
        expected = pipeline.batch_at(step)
        tokens = other.batch_at(step)
        assert tokens["text_ids"].shape == (4, 11)
        encoded = other.encode(partitioning.place_batch(tokens, mesh))
        assert encoded.keys() == expected.keys()
        for name, value in expected.items():
            if name != "text_emb":
                np.testing.assert_array_equal(encoded[name], value)
        # A batch of another size rounds otherwise in the last bit of float32; where that decides
        # the last bit of bfloat16, the difference is 2**-8 of the value.
        np.testing.assert_allclose(encoded["text_emb"], expected["text_emb"], rtol=2**-7)
        assert np.mean(np.asarray(encoded["text_emb"]) != expected["text_emb"]) < 0.01


@pytest.mark.slow
def test_the_run_is_the_same_and_may_switch_between_the_two(stored, on_the_fly, tmp_path):
    expected = run(stored, tmp_path / "stored")
    run(stored, tmp_path / "mixed", steps=2)
    for workdir in ("fly", "mixed"):
        state = run(on_the_fly, tmp_path / workdir)
        assert int(state.step) == 4 and int(state.skipped) == 0
        apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, expected.params)
        print(f"{workdir}: parameters at most {max(jax.tree.leaves(apart)):.2g} apart")
        assert max(jax.tree.leaves(apart)) < 1e-4


@pytest.mark.slow
def test_two_processes_are_one_run(stored, tmp_path):
    """The encoder is sharded over both; each has its own captions."""
    world = pathlib.Path(stored.text.path).parent
    overrides = {
        "text.encoder": "bytes",
        "text.path": stored.text.path,
        "text.max_len": 11,
        "text.on_the_fly": "true",
        "data.max_text_len": 9,
    }
    losses = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        fields = {**overrides, "mesh.fsdp": count}
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "imagen_jax", "train", f"--config={world}/tiny.py"]
        result = subprocess.run(
            ["launch/local_processes.sh", str(count), *command, f"--workdir={workdir}", *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        rows = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    print(losses)
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_seqio_gives_the_same_tokens(on_the_fly):
    pytest.importorskip("imagen_jax.data.batches.tasks")
    data = dataclasses.replace(on_the_fly.data, loader="seqio")
    pipeline = wiring.open_pipeline(dataclasses.replace(on_the_fly, data=data))
    for step, batch in itertools.islice(enumerate(loaders.batches(pipeline, 5), 5), 2):
        expected = pipeline.batch_at(step)
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert batch[name].dtype == value.dtype
            np.testing.assert_array_equal(batch[name], value)


def test_an_encoder_must_be_named():
    with pytest.raises(ConfigError, match="config.text.on_the_fly=True.*config.text.path"):
        TextConfig(on_the_fly=True)
