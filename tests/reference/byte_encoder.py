"""A folder of a tiny random text encoder that reads bytes, in Hugging Face's T5 format."""

import pathlib

import jax
import numpy as np

from imagen_jax.config.text import T5Config
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5


def write_byte_encoder(folder: pathlib.Path, dim: int = 8) -> str:
    """Writes an encoder of width `dim`; returns the folder, a `config.text.path`."""
    shape = T5Config(vocab_size=384, emb_dim=dim, num_layers=1, num_heads=2, head_dim=4, mlp_dim=16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), t5.parameter_shapes(shape)
    )
    hf_t5.save(folder, shape, params)
    return str(folder)
