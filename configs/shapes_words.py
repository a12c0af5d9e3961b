"""The long demo with words among its images: `the word "sun" in red`, three letters of a font.

    bash launch/demo.sh runs/words configs/shapes_words.py \\
      --config.pretrain_text.corpus=runs/words/data/paraphrases_words.jsonl

`base` and `sr` are the stages of configs/shapes_long.py. A third of the images are words, and the
base stage trains for 25,000 steps. A sixth of the words is held out of images and text, so that
DrawBench's category Text tests spelling.

Hardware: two CPU cores. Time: 26 minutes beside other work. Result (docs/learning.md, one run):
0.98 of the held-out words are exact, 0.99 of one object, 0.82 of counts, 0.77 of spatial relations.

data.loader is numpy for the reason given in configs/shapes.py.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

LONG = str(pathlib.Path(__file__).with_name("shapes_long.py"))
CONFIGS = ("base", "sr")


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base` or `sr`."""
    c = overrides.from_file(LONG, name)
    c.data.mixture.shapes_words = {"name": "shapes_words", "rate": 5}
    # Single letters in place of whole three-letter words: fewer pieces.
    c.pretrain_text.vocab_size = 460
    c.pretrain_text.steps = 1_800
    if name == "base":
        c.train.steps = 25_000  # Spelling takes about 100,000 images of words.
    return c
