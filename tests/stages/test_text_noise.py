"""Noise on the text embeddings in training: its size, its place, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.stages import loss as loss_module
from imagen_jax.stages.conditioning import Text, add_text_noise
from imagen_jax.stages.loss import loss_given_randomness, sample_randomness


def with_noise(config, level: float):
    return dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, text_noise=level)
    )


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_the_noise_is_relative_to_the_real_tokens(scale):
    rng = np.random.default_rng(0)
    emb = scale * rng.normal(size=(2, 5, 4_000)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    emb[1, 2:] = 0
    eps = jnp.asarray(rng.normal(size=emb.shape), jnp.float32)
    noised = np.asarray(add_text_noise(Text(emb, mask), eps, 0.5).emb)
    np.testing.assert_array_equal(noised[1, 2:], 0)
    for row in range(2):
        added = (noised - emb)[row][mask[row]]
        assert added.std() == pytest.approx(0.5 * scale, rel=0.02)
    np.testing.assert_array_equal(add_text_noise(Text(emb, mask), eps, 0.0).emb, emb)


def test_a_batch_without_real_tokens_stays_as_it_is():
    text = Text(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), bool))
    np.testing.assert_array_equal(add_text_noise(text, jnp.ones((1, 3, 4)), 1.0).emb, 0)


def test_the_rest_of_the_randomness_stays(base_config):
    key = jax.random.key(3)
    without = sample_randomness(key, 4, base_config)
    given = sample_randomness(key, 4, with_noise(base_config, 1.0))
    eps = given.pop("text_eps")
    assert eps.shape == (4, base_config.data.max_text_len, base_config.model.text_dim)
    assert given.keys() == without.keys()
    for name, value in without.items():
        np.testing.assert_array_equal(given[name], value)


def test_the_network_sees_the_noised_text_and_dropped_captions_as_before(
    base_config, make_batch, monkeypatch
):
    seen = {}

    def record(params, config, z, logsnr, conditioning, **_):
        seen["text"] = conditioning.text.emb
        return z

    monkeypatch.setattr(loss_module, "apply", record)
    config = with_noise(base_config, 1.0)
    batch = jax.tree.map(jnp.asarray, make_batch(config))
    batch |= sample_randomness(jax.random.key(1), 4, config)
    batch["drop"] = jnp.arange(4) == 2
    loss_given_randomness({}, batch, jax.random.key(2), config)
    text, mask = np.asarray(seen["text"]), np.asarray(batch["text_mask"])
    assert not text[2].any()
    for row in (0, 1, 3):
        assert (text[row][mask[row]] != np.asarray(batch["text_emb"])[row][mask[row]]).all()
        np.testing.assert_array_equal(
            text[row][~mask[row]], np.asarray(batch["text_emb"])[row][~mask[row]]
        )
