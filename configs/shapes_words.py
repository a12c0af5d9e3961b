"""The shapes world with words in it: three letters of a bundled font, `the word "sun" in red`.

    bash launch/demo.sh runs/words configs/shapes_words.py \\
      --config.pretrain_text.corpus=runs/words/data/paraphrases_words.jsonl

`base` and `sr` are the stages of configs/shapes.py; every other picture is a word. A sixth of the
words is in no picture and no text: what DrawBench's category Text asks for has to be spelled.
"""

import pathlib

import ml_collections

from imagen_jax import config_io

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))

STEPS = {"base": 16_500, "sr": 10_000}
RATES = {"shapes_world": 1, "shapes_words": 1}


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = config_io.from_file(SHAPES, name)
    c.data.mixture = {source: {"name": source, "rate": rate} for source, rate in RATES.items()}
    # Whole words of the world, but of its three-letter words the letters: few pieces.
    c.pretrain_text.vocab_size = 460
    c.train.steps = STEPS[name]
    return c
