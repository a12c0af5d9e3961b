"""The shapes world with twice the training and more pictures of who is where.

    make demo_long    # launch/demo.sh with this configuration

`base` and `sr` are the stages of configs/shapes.py. They read a mixture: seven of ten examples from
the shapes world, three from further scenes of two objects in a relation, which take more pictures
to learn than objects alone.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))

STEPS = {"base": 16_500, "sr": 6_500}
RATES = {"shapes_world": 7, "shapes_relations": 3}


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.mixture = {source: {"name": source, "rate": rate} for source, rate in RATES.items()}
    c.train.steps = STEPS[name]
    if name == "base":
        c.sampling.guidance_weight = 1.75
    else:
        c.sampling.steps = 16
    return c
