"""The shapes world with about twice the training and more pictures of who is where.

    make demo_long    # launch/demo.sh with this configuration

`base` and `sr` are the stages of configs/shapes.py. They read a mixture: seven of ten examples from
the shapes world, three from further scenes of two objects in a relation, which take more pictures
to learn than objects alone.
"""

import importlib.util
import pathlib

import ml_collections

STEPS = {"base": 14_500, "sr": 5_000}
RATES = {"shapes_world": 7, "shapes_relations": 3}
DATA = "runs/demo_long/data"


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = _shapes().get_config(name)
    c.data.mixture = {
        source: {"name": source, "path": DATA, "rate": rate} for source, rate in RATES.items()
    }
    c.train.steps = STEPS[name]
    if name == "base":
        c.sampling.guidance_weight = 1.75
    return c


def _shapes():
    spec = importlib.util.spec_from_file_location(
        "shapes_config", pathlib.Path(__file__).with_name("shapes.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
