"""The shapes world with more than twice the training and more spatial relations.

    make demo_long    # launch/demo.sh with this configuration

`base` and `sr` are the stages of configs/shapes.py. They train on a mixture: seven of ten examples
from the shapes world, three from further scenes of two objects in a relation, which take more
examples to learn than objects alone.

Hardware: two CPU cores. Time: 13 to 20 minutes. Result (docs/learning.md, mean of three runs): 0.98
of the held-out prompts of one object are exact, 0.78 of counts, 0.90 of spatial relations.

data.loader is numpy for the reason given in configs/shapes.py.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))

CONFIGS = ("base", "sr")
STEPS = {"base": 16_500, "sr": 6_500}
RATES = {"shapes_world": 7, "shapes_relations": 3}


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.mixture = {source: {"name": source, "rate": rate} for source, rate in RATES.items()}
    c.train.steps = STEPS[name]
    if name == "base":
        c.sampling.guidance_weight = 1.75
    else:
        c.sampling.steps = 16
    return c
