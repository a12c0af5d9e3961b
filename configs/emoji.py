"""Emoji from their names: a cascade 16 -> 64 with MiniLM as the text encoder.

    make emoji        # launch/emoji.sh

`base` generates 16x16 images, `sr` upsamples 16 -> 64. The images are OpenMoji's, the captions
Unicode's English names. The text encoder is all-MiniLM-L6-v2, trained on text from the web and
frozen. `config.text.path` of another encoder and `config.data.embeddings` replace it.

Hardware: two CPU cores. Time and result: docs/emoji.md.

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
    c.data.name = "emoji"
    c.data.path = "runs/emoji/data"
    c.data.embeddings = "runs/emoji/embeddings"
    c.data.captions = {"caption": 0.5, "short": 0.5}  # Fewer words: worlds/emoji/shorter.py.
    c.data.max_text_len = c.text.max_len = 24
    c.text.encoder = "bert"
    c.text.path = "minilm"
    c.pretrain_text.corpus = ""
    c.checkpoint.every = 2_500
    c.sampling.thresholding = "static"  # Dynamic thresholding greys the white: docs/emoji.md.
    if name == "base":
        c.train.steps = 27_000
        c.optimizer.decay_fraction = 0.5
        # Near words mean the same: docs/emoji.md.
        c.model.text_pooling = "mean"
        c.diffusion.text_noise = 0.25
    else:
        c.train.steps = 13_000
        c.sampling.guidance_weight = 1.0
    return c
