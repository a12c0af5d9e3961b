"""Text encoders: tokens, end tokens and cuts, fingerprints, prompts, errors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from imagen_jax.config import plugins
from imagen_jax.config import schema as config_lib
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning
from imagen_jax.text import encoders, vocabulary
from imagen_jax.training import pretrain_text

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_t5x"
CAPTIONS = ["a red circle above a blue square", "two small green crosses", "a white triangle"] * 4
TINY = T5Config(vocab_size=600, emb_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=16)


def random_params(config, seed=0):
    ids = jnp.zeros((1, 2), jnp.int32)
    return t5.T5Encoder(config).init(jax.random.key(seed), ids, ids == 0)["params"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    hf_t5.save(path, TINY, random_params(TINY))
    (path / "spiece.model").write_bytes(pretrain_text.train_vocabulary(CAPTIONS, 1000))
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.load_text_encoder(TextConfig(path=str(folder), max_len=8))


def test_tokens_end_with_the_end_token_cut_or_not(encoder):
    batch = encoder.tokenize(["a red circle", "", "a red circle above a blue square and more"])
    lengths = batch.mask.sum(1)
    assert batch.ids.dtype == np.int32 and batch.ids.shape == batch.mask.shape == (3, 8)
    assert lengths.tolist() == [4, 1, 8]
    assert batch.truncated == (2,)
    for row, length in enumerate(lengths):
        assert batch.ids[row, length - 1] == vocabulary.EOS_ID
        assert vocabulary.EOS_ID not in batch.ids[row, : length - 1]
        assert not batch.ids[row, length:].any()
        assert batch.mask[row, :length].all()


def test_a_caption_of_exactly_max_len_is_not_cut(encoder):
    batch = encoder.tokenize(["a red circle above a blue square"])
    assert batch.mask.sum() == encoder.token_count("a red circle above a blue square") == 8
    assert batch.truncated == ()


def test_every_vector_depends_on_its_own_caption_only(encoder):
    pair = encoder.tokenize(["a red circle", "two small green crosses"])
    other = encoder.tokenize(["a red circle", "a white triangle"])
    first, second = (np.asarray(encoder.encode(b.ids, b.mask)) for b in (pair, other))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.abs(first[1] - second[1]).max() > 0.1
    assert first.shape == (2, 8, encoder.dim) and first.dtype == np.float32
    assert not first[~pair.mask].any()


def test_prompts_do_not_depend_on_the_batch_size(encoder):
    prompts = ["a red circle", "", "a white triangle", "a blue square", "two crosses"]
    small = encoders.embed_prompts(encoder, prompts, batch_size=2, max_len=6)
    large = encoders.embed_prompts(encoder, prompts, batch_size=8, max_len=6)
    np.testing.assert_array_equal(small[1], large[1])
    np.testing.assert_allclose(small[0], large[0], atol=1e-6)
    assert small[0].shape == (5, 6, 16)
    assert small[1].sum(1).tolist() == [encoder.token_count(p) for p in prompts]
    assert not small[0][~small[1]].any()


def test_prompts_are_padded_to_buckets_whatever_others_there_are(folder, monkeypatch):
    encoder = encoders.load_text_encoder(TextConfig(path=str(folder), max_len=72))
    prompts = ["a red circle", "a white triangle " * 11, "a blue square", "two crosses " * 34]
    counts = [encoder.token_count(prompt) for prompt in prompts]
    assert counts[0] < 32 < counts[1] < 64 < counts[3] <= 72
    lengths = []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda ids, mask: lengths.append(ids.shape) or encode(ids, mask)
    )
    emb, mask = encoders.embed_prompts(encoder, prompts, batch_size=4, max_len=70)
    assert lengths == [(4, 32), (4, 64), (4, 72)]
    whole = encoder.tokenize(prompts)
    expected = np.asarray(encode(whole.ids, whole.mask))[:, :70]
    np.testing.assert_allclose(emb, expected, atol=2e-6)
    np.testing.assert_array_equal(mask, whole.mask[:, :70])
    alone, _ = encoders.embed_prompts(encoder, prompts[:1], batch_size=4, max_len=70)
    np.testing.assert_array_equal(alone[0], emb[0])


def test_prompts_are_padded_beyond_the_encoders_length(encoder):
    emb, mask = encoders.embed_prompts(encoder, ["a red circle"], batch_size=1, max_len=12)
    assert emb.shape == (1, 12, 16) and mask.sum() == 4 and not emb[:, 8:].any()


@pytest.mark.parametrize("max_len", [3, 12])
def test_a_cut_prompt_is_named_once(encoder, max_len):
    long = "a red circle above a blue square and a white triangle"
    prompts = [long] if max_len > 8 else ["a red circle"]
    count = encoder.token_count(prompts[0])
    with pytest.warns(
        UserWarning, match=f"{prompts[0]}.* {count} tokens, max_len={min(max_len, 8)}"
    ):
        encoders.embed_prompts(encoder, [*prompts, ""], batch_size=2, max_len=max_len)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoders.embed_prompts(encoder, ["red", ""], batch_size=2, max_len=max_len)


def test_each_difference_changes_its_field_of_the_fingerprint(folder, encoder, tmp_path):
    base = encoder.fingerprint()
    assert base == encoders.load_text_encoder(TextConfig(path=str(folder), max_len=8)).fingerprint()
    json.dumps(base)

    def changed(name, path, max_len=8):
        other = encoders.load_text_encoder(
            TextConfig(encoder=name, path=str(path), max_len=max_len)
        )
        return {field for field, value in other.fingerprint().items() if value != base[field]}

    assert changed("t5", folder, max_len=9) == {"max_len"}
    shutil.copytree(folder, tmp_path / "vocabulary")
    other = pretrain_text.train_vocabulary(CAPTIONS + ["a dog"], 1000)
    (tmp_path / "vocabulary" / "spiece.model").write_bytes(other)
    assert changed("t5", tmp_path / "vocabulary") == {"vocabulary_sha256"}
    shutil.copytree(folder, tmp_path / "weights")
    hf_t5.save(tmp_path / "weights", TINY, random_params(TINY, seed=1))
    assert changed("t5", tmp_path / "weights") == {"weights_sha256"}
    farther = dataclasses.replace(TINY, relative_max_distance=64)
    hf_t5.save(tmp_path / "weights", farther, random_params(TINY))
    assert changed("t5", tmp_path / "weights") == {"weights_sha256"}


def test_bytes_need_no_vocabulary_file(folder):
    encoder = encoders.load_text_encoder(TextConfig(encoder="bytes", path=str(folder), max_len=16))
    batch = encoder.tokenize(["aé", "x" * 16])
    assert batch.ids[0, :4].tolist() == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert batch.truncated == (1,)


def test_bytes_are_tokens_of_byt5(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ByT5Tokenizer()
    encoder = encoders.load_text_encoder(TextConfig(encoder="bytes", path=str(folder), max_len=64))
    captions = ["a red circle", "", "naïve café, 日本語 🎉", "  two  spaces\n"]
    batch = encoder.tokenize(captions)
    for caption, ids, mask in zip(captions, batch.ids, batch.mask, strict=True):
        assert ids[mask].tolist() == theirs(caption)["input_ids"]
    assert t5.T5_PRESETS["byt5_small"].vocab_size >= vocabulary.ByteVocabulary.size


def test_a_t5x_folder_is_an_encoder_too(tmp_path):
    shape = T5Config(vocab_size=128, emb_dim=32, num_layers=3, num_heads=4, head_dim=8, mlp_dim=64)
    (tmp_path / "t5_config.json").write_text(json.dumps(dataclasses.asdict(shape)))
    shutil.copytree(GOLDEN / "checkpoint_1000", tmp_path / "checkpoint_1000")
    config = TextConfig(path=str(tmp_path / "checkpoint_1000"), max_len=8)
    with pytest.raises(ConfigError, match="has no spiece.model"):
        encoders.load_text_encoder(config)
    (tmp_path / "spiece.model").write_bytes(pretrain_text.train_vocabulary(CAPTIONS, 1000))
    # The weights load; the golden table is too small for a vocabulary with byte pieces.
    with pytest.raises(ConfigError, match=r"vocabulary has \d+ pieces.*table 128 rows"):
        encoders.load_text_encoder(config)


def write_t5x(folder, params):
    """A t5x checkpoint with all arrays in its msgpack file."""

    def pack(array):
        array = np.asarray(array)
        content = (array.shape, str(array.dtype), array.tobytes())
        return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))

    encoder = jax.tree.map(pack, jax.device_get(partitioning.unbox(params)))
    target = {"token_embedder": encoder.pop("token_embedder"), "encoder": encoder}
    folder.mkdir()
    tree = {"optimizer": {"target": target}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))


def test_a_t5x_checkpoint_at_an_address_with_preset_and_vocabulary(
    folder, encoder, tmp_path, monkeypatch
):
    monkeypatch.setitem(t5.T5_PRESETS, "tiny", TINY)
    write_t5x(tmp_path / "checkpoint_7", random_params(TINY))
    address = f"file://{tmp_path}/checkpoint_7"
    vocabulary = f"file://{folder}/spiece.model"
    config = TextConfig(path=address, preset="tiny", vocabulary=vocabulary, max_len=8)
    assert encoders.load_text_encoder(config).fingerprint() == encoder.fingerprint()
    # Beside the checkpoint both are found.
    (tmp_path / "t5_config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    shutil.copy(folder / "spiece.model", tmp_path)
    for path in (address, f"{tmp_path}/checkpoint_7"):
        found = encoders.load_text_encoder(TextConfig(path=path, max_len=8))
        assert found.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "t5_v1_1_xxxl"}, "config.text.preset='t5_v1_1_xxxl'.*did you mean 't5_v1_1_x"),
        (
            {"preset": "t5_small"},
            "does not fit .*emb_dim=512, not 16.*leave it empty",
        ),
        ({"vocabulary": "nowhere.model"}, "config.text.vocabulary='nowhere.model' is not a file"),
        ({"path": "file:///nowhere/checkpoint_1"}, "no t5_config.json.*config.text.preset"),
        ({"path": "gss://bucket/checkpoint_1", "preset": "t5_small"}, "gss://.*cannot be opened"),
    ],
)
def test_a_missing_file_at_an_address_is_named(folder, change, message):
    with pytest.raises(ValueError, match=message):
        encoders.load_text_encoder(dataclasses.replace(TextConfig(path=str(folder)), **change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TextConfig(), r"config.text.path='' is empty; run pretrain_text"),
        (TextConfig(path="nowhere"), r"config.text.path='nowhere' is not a folder"),
        (TextConfig(encoder="t6"), r"config.text.encoder='t6'.*did you mean 't5'"),
    ],
)
def test_errors_name_field_and_fix(config, message):
    with pytest.raises(ConfigError, match=message):
        encoders.load_text_encoder(config)


def test_an_encoder_of_another_package_is_found_by_its_path():
    config = TextConfig(encoder="tests.reference.fake_encoder:load", max_len=4)
    encoder = encoders.load_text_encoder(config)
    assert encoder.fingerprint() == {"encoder": "fake"}
    assert isinstance(encoder, encoders.TextEncoder)
    for name in ("tests.reference.fake_encoder:missing", "tests.no_such_module:load"):
        with pytest.raises(ConfigError, match=f"config.text.encoder='{name}'.*cannot be imported"):
            encoders.load_text_encoder(TextConfig(encoder=name))


def test_an_encoder_of_another_package_is_found_by_its_entry_point(monkeypatch):
    point = importlib.metadata.EntryPoint(
        "fake", "tests.reference.fake_encoder:load", plugins.TEXT_ENCODERS
    )

    def entry_points(group):
        return [point] if group == plugins.TEXT_ENCODERS else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert encoders.load_text_encoder(TextConfig(encoder="fake")).fingerprint() == {
        "encoder": "fake"
    }
    with pytest.raises(ConfigError, match="'fakes' is not one of t5, .*fake; did you mean 'fake'"):
        encoders.load_text_encoder(TextConfig(encoder="fakes"))


def test_a_damaged_vocabulary_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="spiece.model is not a SentencePiece model"):
        encoders.load_text_encoder(TextConfig(path=str(tmp_path / "t5")))


def test_max_len_must_hold_a_token_and_the_end_token(folder):
    with pytest.raises(config_lib.ConfigError, match="config.text.max_len=1 must be at least 2"):
        encoders.load_text_encoder(TextConfig(path=str(folder), max_len=1))
