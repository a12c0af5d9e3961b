"""The shapes cascade with MiniLM, which has read the web, as the text encoder.

    python -m imagen_jax embed --config=configs/shapes_minilm.py:base
    python -m imagen_jax train --config=configs/shapes_minilm.py:base --workdir=WORKDIR

after `make demo`, whose images and captions it takes. `base` and `sr` are those of
configs/shapes.py. An encoder that has read other text than this world's captions keeps unknown
words apart, which a rare word of `imagen dreambooth` needs; it orders two objects worse.

Hardware: one CPU core. Time and result: docs/tuning.md.

data.loader is numpy for the reason given in configs/shapes.py.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))
CONFIGS = ("base", "sr")


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.embeddings = "runs/shapes_minilm/embeddings"
    c.data.max_text_len = c.text.max_len = 24
    c.text.encoder = "bert"
    c.text.path = "minilm"
    c.pretrain_text.corpus = ""
    return c
