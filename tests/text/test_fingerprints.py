"""fingerprints.py: the cached fingerprint of an encoder is that of its files."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import hf_t5
from imagen_jax.io import buckets, copies
from imagen_jax.models import t5
from imagen_jax.text import fingerprints
from imagen_jax.text.encoders import load_text_encoder
from tests import object_stores

SHAPE = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=16)


@pytest.fixture
def config(tmp_path, monkeypatch) -> TextConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(tmp_path / "text", 1.0)
    return TextConfig(encoder="bytes", path=str(tmp_path / "text"), max_len=16)


def save(folder, value: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, value, np.float32), t5.parameter_shapes(SHAPE)
    )
    hf_t5.save(folder, SHAPE, params)


def test_the_weights_are_read_once(config, monkeypatch):
    expected = load_text_encoder(config).fingerprint()
    assert fingerprints.fingerprint(config) == expected
    monkeypatch.setattr(fingerprints, "load_text_encoder", None)
    assert fingerprints.fingerprint(config) == expected


def test_other_weights_or_settings_are_read_again(config, tmp_path):
    first = fingerprints.fingerprint(config)
    longer = dataclasses.replace(config, max_len=17)
    assert fingerprints.fingerprint(longer) == {**first, "max_len": 17}
    save(tmp_path / "text", 2.0)
    second = fingerprints.fingerprint(config)
    assert second == load_text_encoder(config).fingerprint() != first


def test_a_damaged_cache_or_none_is_no_error(config, tmp_path, monkeypatch):
    expected = fingerprints.fingerprint(config)
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text("{")
    assert fingerprints.fingerprint(config) == expected
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprints.fingerprint(config) == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert fingerprints.fingerprint(config) == expected


def upload(folder, address: str) -> None:
    for file in folder.iterdir():
        buckets.write(f"{address}/{file.name}", file.read_bytes())


def test_of_an_encoder_in_a_bucket_one_machine_reads_the_weights(config, tmp_path, monkeypatch):
    expected, store = fingerprints.fingerprint(config), "gs://bucket/text"
    with object_stores.in_memory() as requests:
        upload(tmp_path / "text", "s3://bucket/t5")
        remote = dataclasses.replace(config, path="s3://bucket/t5")
        assert fingerprints.fingerprint(remote, store) == expected
        with monkeypatch.context() as patch:
            patch.setattr(fingerprints, "load_text_encoder", None)
            requests.clear()
            assert fingerprints.fingerprint(remote, store) == expected
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another_machine"))
            assert fingerprints.fingerprint(remote, store) == expected
            assert requests["list"] == 0 and requests["read"] <= 2 * 15 + 1
        save(tmp_path / "text", 2.0)
        upload(tmp_path / "text", "s3://bucket/t5")
        copies._copy.cache_clear()  # As in a new process.
        assert fingerprints.fingerprint(remote, store) != expected
        # Of weights under other names nothing is kept.
        upload(tmp_path / "text", "s3://bucket/sharded")
        content = buckets.read("s3://bucket/sharded/model.safetensors").data
        buckets.write("s3://bucket/sharded/another.safetensors", content)
        buckets.delete(["s3://bucket/sharded/model.safetensors"])
        sharded = dataclasses.replace(remote, path="s3://bucket/sharded")
        assert fingerprints._cache_file(sharded) is None
