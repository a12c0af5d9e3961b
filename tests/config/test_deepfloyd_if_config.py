"""configs/deepfloyd_if.py has the size of the public network."""

import pathlib

import jax

from imagen_jax.config import overrides
from imagen_jax.stages.network import init_params

FILE = pathlib.Path(__file__).parents[2] / "configs" / "deepfloyd_if.py"


def test_if_xl_has_4_3_billion_parameters():
    """As stated with the weights."""
    config = overrides.load(f"{FILE}:xl")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 1) == 4.3
