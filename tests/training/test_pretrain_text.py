"""Pre-training of the small encoder: it learns, is reproducible, and writes a usable folder."""

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


def test_eight_captions_in_four_scripts_make_an_encoder(small):
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


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(small, tmp_path):
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
    # Two words are near each word, itself included: ln 2 nats each is all that can be had.
    assert last["loss"] < 1.0 < first["loss"]
    assert any(line.startswith("step 100/150") for line in lines)


def test_what_paraphrases_share_outweighs_how_they_put_it(tmp_path):
    things = ["sun", "moon", "fish", "bird", "oven", "road"]
    ways = ["here is {}", "{} only", "we see {} now"]
    groups = [[way.format(thing) for way in ways] for thing in things]
    config = dataclasses.replace(SMALL, emb_dim=32, mlp_dim=32, steps=150, batch_size=32)
    out = tmp_path / "encoder"
    pretrain.pretrain_text(groups, config, str(out), seed=0, max_len=16, log=lambda line: None)
    encoder = encoders.load_text_encoder(TextConfig(path=str(out), max_len=16))
    places = (2, 0, 2)  # of the thing in each way
    vectors = []
    for way, place in zip(ways, places, strict=True):
        batch = encoder.tokenize([way.format(thing) for thing in things])
        pieces = np.asarray(encoder.encode(batch.ids, batch.mask))
        vectors.append(pieces[:, place])
    units = np.array(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    alike = np.einsum("wtd,vud->wvtu", units, units)
    same = np.diagonal(alike, axis1=2, axis2=3)
    other = alike[..., ~np.eye(len(things), dtype=bool)]
    assert same.min() > other.max()


def test_a_word_is_found_in_a_paraphrase_only_where_it_is_unmistakable():
    is_word = jnp.array([False, False, True, True, True, True])  # padding, end, four words
    caption = jnp.array([[2, 3, 4, 1, 0], [2, 2, 3, 1, 0]])
    other = jnp.array([[4, 5, 2, 1, 0], [3, 2, 1, 0, 0]])
    places = np.argwhere(pretrain.matching_positions(caption, other, is_word))
    assert places.tolist() == [[0, 0, 2], [0, 2, 0], [1, 2, 0]]


def test_words_near_a_place_are_counted_once_each_without_the_end_mark():
    is_word = jnp.array([False, False, True, True, True])
    words = jnp.array([[2, 3, 3, 4, 1, 0]])
    near = np.asarray(pretrain.nearby_word_counts(words, is_word, context=1))[0]
    assert near[0].tolist() == [0, 0, 1, 1, 0]
    assert near[1].tolist() == [0, 0, 1, 2, 0]
    assert near[3].tolist() == [0, 0, 0, 1, 1]
    assert near[:, :2].sum() == 0


def test_a_place_without_its_word_in_the_paraphrase_is_asked_for_all_of_it():
    is_word = jnp.array([False, False, True, True, True, True])
    caption, other = jnp.array([[2, 3, 1, 0, 0]]), jnp.array([[4, 5, 2, 4, 1]])
    wanted = np.asarray(pretrain.target_counts(caption, other, is_word, context=1))[0]
    assert wanted[0].tolist() == [0, 0, 1, 0, 1, 1]
    assert wanted[1].tolist() == wanted[2].tolist() == [0, 0, 1, 0, 2, 1]


def test_vectors_without_a_wanted_word_are_not_asked():
    head = 50 * jnp.eye(4)
    x = jnp.eye(4)[jnp.array([[2, 3, 3]])]
    wanted = jnp.array([[[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]], jnp.float32)
    loss, metrics = pretrain.word_loss(x, head, wanted)
    assert loss < 1e-6 and metrics["near_mass"] > 0.999
    loss, metrics = pretrain.word_loss(x, head, wanted[:, ::-1])
    assert loss > 10 and 0.4 < metrics["near_mass"] < 0.6


def test_groups_of_unequal_size_repeat_their_own_captions():
    ids = np.arange(12).reshape(6, 2)
    groups = [["a"], ["b", "c", "d"], ["e", "f"]]
    rows = text_corpus.by_group(ids, groups)[..., 0] // 2
    assert rows.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 4]]


def test_a_corpus_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('["a red cross", "one red cross"]\n["zwei Kreise"]\n"no list"\n')
    assert text_corpus.read(str(path), 2) == [["a red cross", "one red cross"], ["zwei Kreise"]]
    with pytest.raises(ConfigError, match=r"corpus.jsonl:3: .*no list.* must be a JSON list"):
        text_corpus.read(str(path), 3)
    with pytest.raises(ConfigError, match="config.pretrain_text.corpus=.* is not a file"):
        text_corpus.read(str(tmp_path / "none"), 1)


def test_nothing_to_learn_from_is_refused(tmp_path):
    for captions in ([], ["", "  "]):
        with pytest.raises(ConfigError, match="got no caption with text"):
            run(captions, SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_small_a_vocabulary_names_a_size_that_works(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=260)
    with pytest.raises(ConfigError, match="config.pretrain_text.vocab_size=260.*try") as caught:
        run(FEW, config, tmp_path / "out")
    works = int(str(caught.value).rsplit("try ", 1)[1])
    assert text_corpus.train_vocabulary(FEW, works)


def test_a_foreign_folder_is_left_alone_and_an_earlier_result_replaced(small, tmp_path):
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
