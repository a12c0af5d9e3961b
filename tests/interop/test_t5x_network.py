"""t5x's own network as an encoder: needs t5x (launch/install_t5x.sh), else only its message."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import t5x, t5x_network
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.text.frozen_encoder import encode_tokens

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_t5x"
HF = pathlib.Path(__file__).parents[1] / "golden" / "t5_hf" / "v1_1_gated_gelu_encoder"
CONFIG = T5Config(vocab_size=128, emb_dim=32, num_layers=3, num_heads=4, head_dim=8, mlp_dim=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_t5x_and_ours_give_the_golden_vectors(dtype):
    pytest.importorskip("t5x")
    golden = dict(np.load(GOLDEN / "encoder_golden.npz"))
    shape, params = t5x.load(GOLDEN / "checkpoint_1000", dataclasses.replace(CONFIG, dtype=dtype))
    theirs = t5x_network.T5xConfig(**dataclasses.asdict(shape))
    ids, mask = golden["tokens"].astype(np.int32), golden["mask"]
    with jax.default_matmul_precision("highest"):
        vectors, ours = (
            np.asarray(encode_tokens(params, ids, mask, config=c)) for c in (theirs, shape)
        )
    expected = golden["encoded" if dtype == "float32" else "encoded_bf16"]
    tolerance = 2e-5 if dtype == "float32" else 0.1
    assert np.abs(vectors - expected)[mask].max() < tolerance
    assert np.abs(vectors - ours)[mask].max() < tolerance
    assert not vectors[~mask].any()


def test_shapes_that_t5x_does_not_support_are_rejected():
    pytest.importorskip("t5x")
    config = t5x_network.T5xConfig(**{**dataclasses.asdict(CONFIG), "relative_max_distance": 64})
    with pytest.raises(ConfigError, match="has relative_max_distance=128, the weights have 64"):
        t5x_network.make_encoder(config)


@pytest.mark.skipif(importlib.util.find_spec("t5x") is not None, reason="t5x is installed")
def test_without_t5x_its_row_says_how_to_get_it():
    with pytest.raises(ConfigError, match="needs t5x.*launch/install_t5x.sh"):
        load_text_encoder(TextConfig(encoder="t5x", path=str(HF)))
