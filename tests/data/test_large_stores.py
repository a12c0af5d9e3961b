"""key_table.py, packs.py: stores of many captions open without reading them."""

from __future__ import annotations

import pathlib
import threading

import numpy as np
import pytest

from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings import embed, key_table, packs, plan_file, shared_plan
from imagen_jax.data.embeddings import store as embeddings
from imagen_jax.data.embeddings.key_table import UnitKeys
from imagen_jax.data.embeddings.store import EmbeddingError, EmbeddingStore
from tests.data.test_embed import (
    CAPTIONS,
    LetterEncoder,
    SlowEncoder,
    embed_together,
    files,
    silent,
)


@pytest.fixture
def large(monkeypatch):
    """Units are packed from two on, into packs of about three."""
    monkeypatch.setattr(packs, "MAX_LOOSE", 2)
    monkeypatch.setattr(packs, "PACK_BYTES", 2000)


def lookup(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    store = EmbeddingStore.open(str(folder))
    store.verify()
    assert store.captions == 40 and store.missing([*CAPTIONS, "other"]) == ["other"]
    return store.lookup(CAPTIONS, 20)


def same(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_packed_store_holds_what_a_store_of_units_holds(tmp_path, monkeypatch):
    units = embed.embed(CAPTIONS, LetterEncoder(), str(tmp_path / "units"), 4, silent)["units"]
    monkeypatch.setattr(packs, "MAX_LOOSE", 2)
    monkeypatch.setattr(packs, "PACK_BYTES", 2000)
    packed = tmp_path / "packed"
    embed.embed(CAPTIONS, LetterEncoder(), str(packed), 4, silent)
    assert not list(packed.glob("unit_*.bin"))
    assert 2 < len(list(packed.glob("pack_*.bin"))) < units / 2
    same(lookup(packed), lookup(tmp_path / "units"))
    assert embed.embed(CAPTIONS, LetterEncoder(0), str(packed), 4, silent)["computed"] == 0


@pytest.mark.parametrize("at", ["read_list", "describe_unit", "write", "publish"])
def test_killed_while_packing(tmp_path, large, monkeypatch, at):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    embed.embed(CAPTIONS, LetterEncoder(), str(whole), 4, silent)
    owner, name = {
        "read_list": (packs.atomic, "write_text"),
        "describe_unit": (packs.unit_file, "describe_unit"),
        "write": (key_table, "write"),
        "publish": (embeddings, "publish_file"),
    }[at]
    original, calls = getattr(owner, name), []

    def die(*args, **kwargs):
        calls.append(args)
        if len(calls) == (1 if at in ("write", "publish") else 3):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            embed.embed(CAPTIONS, LetterEncoder(), str(killed), 4, silent)
    with pytest.raises(EmbeddingError, match="incomplete"):
        EmbeddingStore.open(str(killed))
    assert embed.embed(CAPTIONS, LetterEncoder(0), str(killed), 4, silent)["computed"] == 0
    assert files(killed) == files(whole)


def test_workers_pack_once(tmp_path, large):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(alone), 4, silent)["units"]
    reports = embed_together([SlowEncoder() for _ in range(3)], shared)
    assert sum(report["computed"] for report in reports) == units
    assert files(shared) == files(alone)


def test_a_damaged_or_missing_pack_is_found(tmp_path, large):
    embed.embed(CAPTIONS, LetterEncoder(), str(tmp_path), 4, silent)
    path = sorted(tmp_path.glob("pack_*.bin"))[1]
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(EmbeddingError, match=f"{path.name} is damaged"):
        EmbeddingStore.open(str(tmp_path)).verify()
    path.write_bytes(content[:-1])
    with pytest.raises(EmbeddingError, match=f"{path.name} is missing or damaged"):
        EmbeddingStore.open(str(tmp_path))


def test_a_store_without_a_table_opens_and_embed_adds_it(tmp_path):
    embed.embed(CAPTIONS, LetterEncoder(), str(tmp_path), 4, silent)
    expected, tables = lookup(tmp_path), list(tmp_path.glob("keys_*"))
    assert len(tables) == 4
    for path in tables:
        path.unlink()
    same(lookup(tmp_path), expected)
    embed.embed(CAPTIONS, LetterEncoder(0), str(tmp_path), 4, silent)
    assert sorted(tmp_path.glob("keys_*")) == sorted(tables)
    same(lookup(tmp_path), expected)


def test_the_table_of_other_units_is_not_used(tmp_path):
    embed.embed(CAPTIONS[:20], LetterEncoder(), str(tmp_path), 4, silent)
    old = {path.name for path in tmp_path.glob("keys_*")}
    embed.embed(CAPTIONS, LetterEncoder(), str(tmp_path), 4, silent)
    assert len({path.name for path in tmp_path.glob("keys_*")} - old) == 4
    lookup(tmp_path)


@pytest.mark.parametrize("part", [7, 100, 10**6])
def test_the_table_is_sorted_in_parts(tmp_path, monkeypatch, part):
    monkeypatch.setattr(key_table, "PART", part)
    rng = np.random.default_rng(0)
    units = []
    for count in (50, 1, 200):
        keys = rng.integers(0, 256, (count, 16), np.uint8)
        keys[: count // 4, 15] = 0  # NumPy strips zeros at the end of a text.
        units.append(UnitKeys(keys.view("S16")[:, 0], rng.integers(0, 9, count).astype("<i4")))
    key_table.write(tmp_path, units, tag="tag", captions=251)
    found, expected = key_table.read(tmp_path, "tag"), key_table.build(units)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.sort(found.keys) == found.keys).all()
    assert {path.name.partition("_")[0] for path in tmp_path.iterdir()} == {"keys"}


def test_that_a_store_covers_a_source_is_remembered(world, monkeypatch):
    data, source, store = world
    assert store.covers(source)
    with monkeypatch.context() as patch:
        patch.setattr(store, "contains", None)
        assert store.covers(source)
        Pipeline(source, store, data, seed=0)
        patch.setattr(source, "fingerprint", "another")
        with pytest.raises(TypeError):
            store.covers(source)


def test_one_worker_makes_the_plan_of_all(tmp_path):
    made = []

    class Counting(SlowEncoder):
        def tokenize(self, captions):
            if len(captions) > 4:
                made.append(len(captions))
            return super().tokenize(captions)

    start = threading.Barrier(3)

    def work():
        start.wait()
        embed.embed([*CAPTIONS, "красный", "круг"], Counting(), str(tmp_path), 4, silent)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [42]
    assert [path.name[:6] for path in tmp_path.iterdir() if path.name[0] == "."] == [".plan_"]
    assert EmbeddingStore.open(str(tmp_path)).captions == 42


def test_a_plan_that_a_worker_did_not_finish_is_made_by_another(tmp_path):
    encoder = LetterEncoder()

    def die(path):
        raise KeyboardInterrupt

    settings = embed.settings_of(encoder, 4)
    with pytest.raises(KeyboardInterrupt):
        shared_plan.get(tmp_path, CAPTIONS, settings, make=die, patience=0.3)
    make = lambda path: embed.write_plan(path, CAPTIONS, encoder, 4)  # noqa: E731
    found = shared_plan.get(tmp_path, CAPTIONS[::-1], settings, make=make, patience=0.3)
    (tmp_path / "expected").mkdir()
    make(tmp_path / "expected")
    expected = plan_file.read(tmp_path / "expected")
    assert found[1:] == expected[1:]
    for one, other in zip(found.units, expected.units, strict=True):
        assert (one.length, list(one.captions), one.tokens) == (
            other.length,
            list(other.captions),
            other.tokens,
        )
