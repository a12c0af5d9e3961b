"""The long demo with words among its pictures: `the word "sun" in red`, three letters of a font.

    bash launch/demo.sh runs/words configs/shapes_words.py \\
      --config.pretrain_text.corpus=runs/words/data/paraphrases_words.jsonl

`base` and `sr` are the stages of configs/shapes_long.py; a third of the pictures are words, and the
base stage trains half as long again. A sixth of the words is in no picture and no text: what
DrawBench's category Text asks for has to be spelled.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

LONG = str(pathlib.Path(__file__).with_name("shapes_long.py"))


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = overrides.from_file(LONG, name)
    c.data.mixture.shapes_words = {"name": "shapes_words", "rate": 5}
    # Whole words of the world, but of its three-letter words the letters: few pieces.
    c.pretrain_text.vocab_size = 460
    c.pretrain_text.steps = 1_800
    if name == "base":
        c.train.steps = 25_000  # To spell takes about a hundred thousand pictures of words.
    return c
