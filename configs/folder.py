"""A folder of captioned pictures: a small cascade 16 -> 64 for two CPU cores.

    bash launch/folder.sh PICTURES RUN_FOLDER

The networks are those of the shapes world, trained longer per picture; a handful of pictures is
memorised. For more pictures or an accelerator raise channels and steps.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.kind = "folder"
    c.data.path = ""
    c.data.embeddings = ""
    c.text.path = ""
    c.data.batch_size = 16
    c.data.max_text_len = c.text.max_len = 64
    c.data.min_size = 64
    c.pretrain_text.corpus = ""
    c.pretrain_text.steps = 200
    c.train.steps = 1500
    c.sampling.guidance_weight = 1.0
    return c
