"""Pre-training of the small encoder: it learns, is reproducible, and writes a usable folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import pretrain_text as pretrain
from imagen_jax import text
from imagen_jax.config import ConfigError, PretrainTextConfig, TextConfig
from imagen_jax.interop import weights

SMALL = PretrainTextConfig(
    emb_dim=16, num_layers=1, num_heads=2, mlp_dim=16, steps=2, batch_size=4, context=2
)
FEW = ["ein rotes Haus über dem Fluß", "赤い丸の上に青い四角", "красный круг", "two cats"] * 2


def run(captions, config, out, seed=0):
    lines = []
    metrics = pretrain.pretrain_text(
        captions, config, str(out), seed=seed, max_len=32, log=lines.append
    )
    return metrics, lines


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "encoder"
    return out, *run(FEW, SMALL, out)


def test_eight_captions_in_four_scripts_make_an_encoder(small):
    out, metrics, lines = small
    encoder = text.load_text_encoder(TextConfig(path=str(out), max_len=32))
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


def test_masked_words_are_learned_from_their_neighbours(tmp_path):
    pairs = ["sun day", "moon night", "fish water", "bird air", "bread oven", "wheel road"]
    config = dataclasses.replace(SMALL, emb_dim=32, mlp_dim=32, steps=150, batch_size=32)
    first, _ = run(pairs, dataclasses.replace(config, steps=1), tmp_path / "first")
    last, lines = run(pairs, config, tmp_path / "last")
    # With 30% hidden, a hidden word's partner is hidden too in 30% of cases: 0.75 is the ceiling.
    assert last["masked_accuracy"] > 0.6 > 0.3 > first["masked_accuracy"]
    assert last["context_accuracy"] > 0.8
    assert any(line.startswith("step 100/150") for line in lines)


def test_context_heads_are_aligned_with_their_offsets():
    targets = jnp.array([[1, 2, 3, 4, 0, 0], [5, 4, 3, 2, 1, 6]])
    real = targets > 0
    tokens = jnp.eye(7)[targets]
    for offset in (-2, 1):
        # Every vector holds the one-hot code of the token `offset` away; other heads are blind.
        x = jnp.roll(tokens, -offset, axis=1)
        heads = jnp.zeros((5, 7, 7)).at[offset + 2].set(50 * jnp.eye(7))
        offsets = jnp.array([0, offset])
        loss, metrics = pretrain.predict(x, heads, targets, real, jnp.zeros_like(real), offsets)
        assert metrics["context_accuracy"] == 1 and loss < 1e-6
        _, others = pretrain.predict(
            x, heads, targets, real, jnp.zeros_like(real), jnp.array([0, -offset])
        )
        assert others["context_accuracy"] < 0.5


def test_only_hidden_tokens_count_for_the_masked_head():
    targets = jnp.array([[1, 2, 3]])
    heads = 50 * jnp.eye(4)[None]
    x = jnp.eye(4)[jnp.array([[1, 2, 1]])]
    real = jnp.ones((1, 3), bool)

    def accuracy(*hidden):
        hidden = jnp.array([hidden])
        return pretrain.predict(x, heads, targets, real, hidden, jnp.array([0]))[1][
            "masked_accuracy"
        ]

    assert accuracy(True, True, False) == 1
    assert accuracy(True, False, True) == 0.5


@pytest.mark.parametrize("context", [0, 1, 8])
def test_offsets_start_with_zero_and_stay_within_the_context(context):

    draws = np.stack([pretrain.draw_offsets(jax.random.key(i), context) for i in range(40)])
    assert not draws[:, 0].any()
    others = draws[:, 1:]
    assert (others != 0).all() and (np.abs(others) <= context).all()
    if context:
        assert others.min() == -context and others.max() == context


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
    assert pretrain.train_vocabulary(FEW, works)


def test_a_foreign_folder_is_left_alone_and_an_earlier_result_replaced(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not an earlier pretrain_text"):
        run(FEW, SMALL, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    out, *_ = small
    before = weights.read_safetensors(out / "model.safetensors")["shared.weight"].copy()
    run(FEW, SMALL, out, seed=0)
    after = weights.read_safetensors(out / "model.safetensors")["shared.weight"]
    np.testing.assert_array_equal(before, after)
