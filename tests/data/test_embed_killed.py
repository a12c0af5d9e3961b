"""`imagen embed` as real processes: two workers, ten of them killed, and the same bytes."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.text import T5Config
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5

ROOT = pathlib.Path(__file__).parents[2]
TINY = T5Config(vocab_size=384, emb_dim=32, num_layers=2, num_heads=2, head_dim=16, mlp_dim=64)
CAPTIONS, KILLS, UNIT = 2000, 10, 16

CONFIG = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    c = overrides.to_config_dict(Config())
    c.data.kind = "folder"
    c.data.loader = "numpy"
    c.data.path = {path!r} + "/" + (name or "pictures")
    c.data.embeddings = {path!r} + "/store"
    c.text.encoder = "bytes"
    c.text.path = {path!r} + "/text"
    c.text.max_len = 64
    c.embed.unit_size = {unit}
    c.embed.patience = 2.0
    return c
"""


def write_pictures(folder: pathlib.Path, captions: list[str]) -> None:
    folder.mkdir()
    for start in range(0, len(captions), 20):
        Image.new("RGB", (16, 16), (start % 256, 0, 0)).save(folder / f"{start:04d}.png")
    rows = [
        json.dumps({"file_name": f"{start:04d}.png", "text": captions[start : start + 20]})
        for start in range(0, len(captions), 20)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small encoder and 2,000 distinct captions of 8 to 60 bytes; and half as many, twice."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / leaf.shape[0] ** 0.5,
        t5.parameter_shapes(TINY),
    )
    hf_t5.save(folder / "text", TINY, params)
    captions = [f"{i:04d} {'word ' * (i % 11)}".strip() for i in range(CAPTIONS)]
    write_pictures(folder / "pictures", captions)
    write_pictures(folder / "repeated", captions[: CAPTIONS // 2] * 2)
    (folder / "config.py").write_text(CONFIG.format(path=str(folder), unit=UNIT))
    return folder


def start(world, log, store, *, seconds=0.0, name="pictures") -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.reference.embed_worker", str(log), str(seconds)]
    command += [f"--config={world}/config.py:{name}", f"--config.data.embeddings={store}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{world}/xla"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(worker: subprocess.Popen) -> str:
    said = worker.communicate(timeout=300)[0]
    assert worker.returncode == 0, said
    return said


def calls(log: pathlib.Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(world):
    """Encoder calls and store of one undisturbed worker."""
    print(finish(start(world, world / "alone.log", world / "alone")))
    return calls(world / "alone.log"), files(world / "alone")


@pytest.mark.slow
def test_ten_kills_and_two_workers_give_the_same_store(world, undisturbed):
    expected_calls, expected_files = undisturbed
    rng = random.Random(0)
    store, log = world / "store", world / "killed.log"
    workers = [start(world, log, store, seconds=0.3) for _ in range(2)]
    killed = seen = 0
    while killed < KILLS:
        # Only while it encodes: a unit after the last kill, and then at any moment.
        while len(calls(log)) <= seen:
            assert any(worker.poll() is None for worker in workers)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.9))
        victim = rng.randrange(2)
        assert workers[victim].poll() is None, "all is done before the last kill"
        workers[victim].send_signal(signal.SIGKILL)
        workers[victim].communicate()
        seen = len(calls(log))
        killed += 1
        workers[victim] = start(world, log, store, seconds=0.3)
    for worker in workers:
        print(finish(worker))

    made = calls(log)
    print(f"{len(set(made))} units, {len(made)} calls, {killed} kills")
    assert set(made) == set(expected_calls)
    assert len(made) <= len(expected_calls) + killed
    assert files(store) == expected_files
    EmbeddingStore.open(str(store)).verify()


@pytest.mark.slow
def test_half_of_the_captions_repeated_costs_half_of_the_calls(world, undisturbed):
    print(finish(start(world, world / "half.log", world / "half", name="repeated")))
    half, whole = len(calls(world / "half.log")), len(undisturbed[0])
    print(f"{half} calls, {whole} for as many distinct captions")
    # Up to one unit more per length, which cannot be filled.
    assert whole / 2 <= half <= whole / 2 + 8
