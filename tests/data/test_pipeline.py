"""pipeline.py: the order is a permutation, hosts agree, batches hold the right images."""

import dataclasses
import itertools
import sys
import threading

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.order import permute
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings import store as embeddings
from imagen_jax.data.embeddings.store import EmbeddingError, EmbeddingStore
from imagen_jax.io import images


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def order(n: int, epoch: int, seed: int) -> np.ndarray:
    return permute(np.arange(n), np.full(n, epoch), n=n, seed=seed)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 65537])
def test_every_epoch_visits_every_record_once(n):
    for epoch in (0, 1, 10**6):
        np.testing.assert_array_equal(np.sort(order(n, epoch, 3)), np.arange(n))


def test_epochs_and_seeds_shuffle_differently_and_look_random():
    n = 5000
    orders = [order(n, epoch, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, -1))]
    for a, b in itertools.combinations([np.arange(n), *orders], 2):
        assert (a == b).sum() < 10  # About one place in common is chance.
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(np.diff(a), np.diff(b))[0, 1]) < 0.07


def test_positions_of_a_record_over_epochs_are_uniform():
    n, epochs = 16, 4000
    first = permute(np.zeros(epochs, np.int64), np.arange(epochs), n=n, seed=5)
    counts = np.bincount(first, minlength=n)
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 38  # 99.9% point with 15 degrees of freedom.


def test_the_permutation_works_far_beyond_memory():
    n = 5 * 10**9
    places = permute(np.arange(1000) + 10**9, np.full(1000, 7), n=n, seed=0)
    assert len(set(places.tolist())) == 1000 and places.min() >= 0 and places.max() < n
    assert places.std() > n / 5


@pytest.fixture
def stream(world):
    data, source, store = world
    return Pipeline(source, store, data, seed=4)


def test_an_epoch_holds_every_image_once(world, stream):
    data, source, _ = world
    n = len(source)
    epochs_of_images = np.concatenate([stream.batch_at(s)["image"] for s in range(6)])
    for epoch in (epochs_of_images[:n], epochs_of_images[n : 2 * n]):
        found = {images.to_uint8(p).tobytes() for p in epoch}
        assert found == {source.record(i).image.tobytes() for i in range(n)}
    assert (epochs_of_images[:n] != epochs_of_images[n : 2 * n]).any()


def test_each_image_has_one_of_its_own_captions(world, stream):
    data, source, store = world
    own = {source.record(i).image.tobytes(): source.captions(i) for i in range(len(source))}
    drawn = {}
    for step in range(40):
        batch = stream.batch_at(step)
        assert {name: value.dtype.name for name, value in batch.items()} == {
            "image": "float32",
            "lowres": "float32",
            "text_emb": "bfloat16",
            "text_mask": "bool",
        }
        for image, emb, mask in zip(
            images.to_uint8(batch["image"]), batch["text_emb"], batch["text_mask"], strict=True
        ):
            captions = own[image.tobytes()]
            options, masks = store.lookup(captions, data.max_text_len)
            same = [i for i, o in enumerate(options) if (o.astype(np.float32) == emb).all()]
            assert len(same) == 1 and (masks[same[0]] == mask).all()
            drawn.setdefault(captions, []).append(same[0])
    for captions, picks in drawn.items():
        assert set(picks) == set(range(len(captions))), "every caption has its turn"


def test_batches_of_all_hosts_are_the_batch_of_one_host(world, stream):
    data, source, store = world
    for step in (0, 5, 10**7):
        parts = [Pipeline(source, store, data, seed=4).part(h, 4).batch_at(step) for h in range(4)]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        equal(joined, stream.batch_at(step))


def test_lowres_equals_the_images_of_the_base_stage(world, stream):
    data, source, store = world
    base_data = dataclasses.replace(data, image_size=16, lowres_size=0)
    base = Pipeline(source, store, base_data, seed=4).batch_at(3)
    np.testing.assert_array_equal(base["image"], stream.batch_at(3)["lowres"])
    assert base.keys() == {"image", "text_emb", "text_mask"}


def test_cached_images_equal_decoded_ones(world, stream):
    data, source, store = world
    uncached = Pipeline(source, store, data, seed=4, cache_bytes=0)
    first = uncached.batch_at(2)
    equal(stream.batch_at(2), first)
    equal(stream.batch_at(2), first)
    equal(stream.part(1, 2).batch_at(2), uncached.part(1, 2).batch_at(2))


def test_prefetched_batches_start_anywhere_and_stop_cleanly(stream):
    before = set(threading.enumerate())
    batches = loaders.batches(stream, 11)
    for step in range(11, 16):
        equal(next(batches), stream.batch_at(step))
    batches.close()
    assert set(threading.enumerate()) <= before  # Threads of other tests may have ended.


def test_an_error_in_the_background_reaches_the_loop(world):
    data, source, store = world
    stream = Pipeline(source, store, data, seed=0)
    batches = loaders.batches(stream, 0)
    next(batches)
    stream.store = None
    with pytest.raises(AttributeError):
        for _ in range(10):
            next(batches)


def test_invalid_settings_are_rejected_at_construction(world, tmp_path):
    data, source, store = world
    with pytest.raises(ConfigError, match="batch_size=8 must be a multiple of 3 parts; try 6"):
        Pipeline(source, store, data, seed=0).part(0, 3)

    one = source.captions(1)
    unit = tmp_path / embeddings.unit_name(one)
    embeddings.write_unit(unit, one, list(store.lookup(one, 1)[0]))
    embeddings.write_manifest(tmp_path, [embeddings.describe_unit(unit)], {})
    with pytest.raises(EmbeddingError, match="lacks 30 captions.*run `imagen embed`"):
        Pipeline(source, EmbeddingStore.open(str(tmp_path)), data, seed=0)


def test_the_fingerprint_depends_on_data_order_and_text(world, stream):
    data, source, store = world
    assert stream.fingerprint() == Pipeline(source, store, data, seed=4).fingerprint()
    assert stream.fingerprint() != Pipeline(source, store, data, seed=5).fingerprint()
    smaller = dataclasses.replace(data, batch_size=4)
    assert stream.fingerprint() != Pipeline(source, store, smaller, seed=4).fingerprint()
    assert stream.fingerprint()["source"] == source.fingerprint


def test_without_tensorflow_the_error_names_the_fix(world, stream, monkeypatch):
    data, source, store = world
    seqio_data = dataclasses.replace(data, loader="seqio")

    monkeypatch.setitem(sys.modules, "seqio", None)
    monkeypatch.delitem(sys.modules, "imagen_jax.data.batches.tasks", raising=False)
    monkeypatch.delattr("imagen_jax.data.batches.tasks", raising=False)
    with pytest.raises(ConfigError, match="'seqio'.*loader=numpy"):
        loaders.batches(Pipeline(source, store, seqio_data, seed=4))
