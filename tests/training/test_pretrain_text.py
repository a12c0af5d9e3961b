"""Pre-training of the small encoder: it learns, is reproducible, and writes a loadable folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import PretrainTextConfig, TextConfig
from imagen_jax.interop import weights
from imagen_jax.io.atomic import OutputError
from imagen_jax.text import encoders
from imagen_jax.training import pretrain_text as pretrain
from imagen_jax.training import text_corpus

SMALL = PretrainTextConfig(
    emb_dim=16, num_layers=1, num_heads=2, mlp_dim=16, steps=2, batch_size=4, context=2
)
FEW = ["ein rotes Haus über dem Fluß", "赤い丸の上に青い四角", "красный круг", "two cats"] * 2


def run(captions, config, out, seed=0):
    lines = []
    metrics = pretrain.pretrain_text(
        [[caption] for caption in captions],
        config,
        str(out),
        seed=seed,
        max_len=32,
        log=lines.append,
    )
    return metrics, lines


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "encoder"
    return out, *run(FEW, SMALL, out)


def test_captions_in_four_scripts_give_an_encoder(small):
    out, metrics, lines = small
    encoder = encoders.load_text_encoder(TextConfig(path=str(out), max_len=32))
    unseen = ["größer", "四角い猫", "☃ snow", "TWO CATS"]
    batch = encoder.tokenize([*unseen, "two cats"])
    assert not (batch.ids == 2).any(), "an unknown token"
    np.testing.assert_array_equal(batch.ids[3], batch.ids[4])
    vectors = np.asarray(encoder.encode(batch.ids, batch.mask))
    assert np.isfinite(vectors).all() and vectors.shape == (5, 32, 16)
    assert json.loads((out / "pretrain.json").read_text()) == metrics
    assert metrics["captions"] == 8 and metrics["steps"] == 2
    assert sum("step 2/2" in line for line in lines) == 1
    assert [path.name for path in out.parent.iterdir()] == ["encoder"]


def test_the_seed_determines_the_files(small, tmp_path):
    out, *_ = small
    run(FEW, SMALL, tmp_path / "again")
    run(FEW, SMALL, tmp_path / "other", seed=1)

    def digest(folder, name):
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    for name in ("model.safetensors", "spiece.model", "config.json"):
        assert digest(out, name) == digest(tmp_path / "again", name)
    assert digest(out, "model.safetensors") != digest(tmp_path / "other", "model.safetensors")


def test_words_are_learned_from_their_neighbours(tmp_path):
    pairs = ["sun day", "moon night", "fish water", "bird air", "bread oven", "wheel road"]
    config = dataclasses.replace(SMALL, emb_dim=32, mlp_dim=32, steps=150, batch_size=32)
    first, _ = run(pairs, dataclasses.replace(config, steps=1), tmp_path / "first")
    last, lines = run(pairs, config, tmp_path / "last")
    assert last["near_mass"] > 0.9 > 0.4 > first["near_mass"]
    # Each word has two nearby words, itself included, so the minimum loss is ln 2 nats.
    assert last["loss"] < 1.0 < first["loss"]
    assert any(line.startswith("step 100/150") for line in lines)


def test_paraphrases_have_more_similar_vectors_than_other_captions(tmp_path):
    things = ["sun", "moon", "fish", "bird", "oven", "road"]
    templates = ["here is {}", "{} only", "we see {} now"]
    groups = [[template.format(thing) for template in templates] for thing in things]
    config = dataclasses.replace(SMALL, emb_dim=32, mlp_dim=32, steps=150, batch_size=32)
    out = tmp_path / "encoder"
    pretrain.pretrain_text(groups, config, str(out), seed=0, max_len=16, log=lambda line: None)
    encoder = encoders.load_text_encoder(TextConfig(path=str(out), max_len=16))
    positions = (2, 0, 2)  # of the object in each template
    vectors = []
    for template, position in zip(templates, positions, strict=True):
        batch = encoder.tokenize([template.format(thing) for thing in things])
        tokens = np.asarray(encoder.encode(batch.ids, batch.mask))
        vectors.append(tokens[:, position])
    units = np.array(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    cosines = np.einsum("wtd,vud->wvtu", units, units)
    same = np.diagonal(cosines, axis1=2, axis2=3)
    other = cosines[..., ~np.eye(len(things), dtype=bool)]
    assert same.min() > other.max()


def test_a_word_matches_only_if_it_is_unique_in_both_captions():
    is_word = jnp.array([False, False, True, True, True, True])  # padding, end, four words
    caption = jnp.array([[2, 3, 4, 1, 0], [2, 2, 3, 1, 0]])
    other = jnp.array([[4, 5, 2, 1, 0], [3, 2, 1, 0, 0]])
    matches = np.argwhere(pretrain.matching_positions(caption, other, is_word))
    assert matches.tolist() == [[0, 0, 2], [0, 2, 0], [1, 2, 0]]


def test_nearby_words_are_counted_without_the_end_of_sequence():
    is_word = jnp.array([False, False, True, True, True])
    words = jnp.array([[2, 3, 3, 4, 1, 0]])
    near = np.asarray(pretrain.nearby_word_counts(words, is_word, context=1))[0]
    assert near[0].tolist() == [0, 0, 1, 1, 0]
    assert near[1].tolist() == [0, 0, 1, 2, 0]
    assert near[3].tolist() == [0, 0, 0, 1, 1]
    assert near[:, :2].sum() == 0


def test_a_position_without_a_match_has_all_words_of_the_paraphrase_as_targets():
    is_word = jnp.array([False, False, True, True, True, True])
    caption, other = jnp.array([[2, 3, 1, 0, 0]]), jnp.array([[4, 5, 2, 4, 1]])
    targets = np.asarray(pretrain.target_counts(caption, other, is_word, context=1))[0]
    assert targets[0].tolist() == [0, 0, 1, 0, 1, 1]
    assert targets[1].tolist() == targets[2].tolist() == [0, 0, 1, 0, 2, 1]


def test_positions_without_targets_are_ignored():
    head = 50 * jnp.eye(4)
    x = jnp.eye(4)[jnp.array([[2, 3, 3]])]
    targets = jnp.array([[[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]], jnp.float32)
    loss, metrics = pretrain.word_loss(x, head, targets)
    assert loss < 1e-6 and metrics["near_mass"] > 0.999
    loss, metrics = pretrain.word_loss(x, head, targets[:, ::-1])
    assert loss > 10 and 0.4 < metrics["near_mass"] < 0.6


def test_groups_of_unequal_size_repeat_their_own_captions():
    ids = np.arange(12).reshape(6, 2)
    groups = [["a"], ["b", "c", "d"], ["e", "f"]]
    rows = text_corpus.by_group(ids, groups)[..., 0] // 2
    assert rows.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 4]]


def test_a_corpus_in_another_encoding_or_with_half_a_character(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes('["ein Bär", "l’été"]\n["b"]\n'.encode("cp1252"))
    assert text_corpus.read(str(path), 9) == [["ein Bär", "l’été"], ["b"]]
    path.write_text('["b"]\n["half \\ud83d"]\n')
    with pytest.raises(ConfigError, match=r"corpus.jsonl:2: a text with an unpaired surrogate"):
        text_corpus.read(str(path), 9)


def test_a_corpus_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('["a red cross", "one red cross"]\n["zwei Kreise"]\n"no list"\n')
    assert text_corpus.read(str(path), 2) == [["a red cross", "one red cross"], ["zwei Kreise"]]
    with pytest.raises(ConfigError, match=r"corpus.jsonl:3: .*no list.* must be a JSON list"):
        text_corpus.read(str(path), 3)
    with pytest.raises(ConfigError, match="config.pretrain_text.corpus=.* is not a file"):
        text_corpus.read(str(tmp_path / "none"), 1)


def test_captions_without_text_are_rejected(tmp_path):
    for captions in ([], ["", "  "]):
        with pytest.raises(ConfigError, match="got no caption with text"):
            run(captions, SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_error_for_a_small_vocabulary_names_a_size_that_works(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=260)
    with pytest.raises(ConfigError, match="config.pretrain_text.vocab_size=260.*try") as caught:
        run(FEW, config, tmp_path / "out")
    works = int(str(caught.value).rsplit("try ", 1)[1])
    assert text_corpus.train_vocabulary(FEW, works)


def test_an_earlier_result_is_replaced_and_any_other_folder_kept(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists and is no earlier pretrain_text"):
        run(FEW, SMALL, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    out, *_ = small
    before = weights.read_safetensors(out / "model.safetensors")["shared.weight"].copy()
    run(FEW, SMALL, out, seed=0)
    after = weights.read_safetensors(out / "model.safetensors")["shared.weight"]
    np.testing.assert_array_equal(before, after)
