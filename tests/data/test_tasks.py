"""tasks.py and feature_converter.py: the seqio stream is `batch_at`, bit for bit."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline

ROOT = pathlib.Path(__file__).parents[2]
seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")
tasks = pytest.importorskip("imagen_jax.data.batches.tasks")


@pytest.fixture
def stream(world):
    data, source, store = world
    return Pipeline(source, store, dataclasses.replace(data, loader="seqio"), seed=9)


def same(batch: dict, expected: dict) -> None:
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype, name
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


@pytest.mark.parametrize("start", [0, 10**9])
def test_seqio_batches_are_batch_at_from_any_step(stream, start):
    for step, batch in itertools.islice(enumerate(loaders.batches(stream, start), start), 7):
        same(batch, stream.batch_at(step))


def test_a_base_stage_has_no_lowres(stream):
    data = dataclasses.replace(stream.data, image_size=16, lowres_size=0)
    base = Pipeline(stream.source, stream.store, data, seed=9)
    same(next(loaders.batches(base, 3)), base.batch_at(3))


def test_hosts_read_their_own_part(stream):
    parts = [next(loaders.batches(stream.part(h, 2), 5)) for h in range(2)]
    whole = stream.batch_at(5)
    same({n: np.concatenate([p[n] for p in parts]) for n in whole}, whole)


def test_every_level_becomes_the_same_float(stream):
    from imagen_jax.data.batches import feature_converter
    from imagen_jax.io import images

    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, -1)
    dataset = tf.data.Dataset.from_tensor_slices(levels).map(feature_converter._to_float)
    in_tensorflow = next(dataset.as_numpy_iterator())
    np.testing.assert_array_equal(in_tensorflow, images.to_float(levels[0]))


def test_the_registered_task_is_usable_by_name_with_any_sharding(stream):
    name = tasks.register(stream)
    assert tasks.register(stream) == name
    task = seqio.get_mixture_or_task(name)
    examples = task.get_dataset(shuffle=True, shard_info=seqio.ShardInfo(1, 4))
    stored = stream.part(1, 4).examples_at(0)
    for i, example in enumerate(examples.take(2).as_numpy_iterator()):
        np.testing.assert_array_equal(example["image"], stored["image"][i])
        count = int(stored["text_mask"][i].sum())
        np.testing.assert_array_equal(example["text_emb"], stored["text_emb"][i, :count])


UNFINISHED = """
import sys, time
from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.sources.registry import open_source

read = IndexedSource.read

def slow(self, i):
    time.sleep(0.02)
    return read(self, i)

IndexedSource.read = slow
data = DataConfig(kind="folder", path=sys.argv[1], embeddings=sys.argv[2], image_size=64,
                  batch_size=64, max_text_len=4, loader="seqio")
stream = Pipeline(open_source(data), EmbeddingStore.open(data.embeddings), data, 0, cache_bytes=0)
batches = loaders.batches(stream)
print(len(next(batches)["image"]))
"""


def test_a_process_with_an_unfinished_stream_ends(world):
    """TensorFlow's threads read ahead while the interpreter ends."""
    data = world[0]
    command = [sys.executable, "-c", UNFINISHED, data.path, data.embeddings]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")
