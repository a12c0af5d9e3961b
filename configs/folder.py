"""A folder of captioned images: a small cascade 16 -> 64 for two CPU cores.

    bash launch/folder.sh IMAGES RUN_FOLDER

The networks are those of configs/shapes.py, trained for more epochs; a few images are memorised.
For more images or an accelerator, raise `model.channels` and `train.steps`.

Hardware: two CPU cores. Time: 14 minutes beside two other trainings. Result with eight photographs
(tests/launch/test_folder_run.py): every sample is closest to its own photograph, at 22 dB or more.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))
CONFIGS = ("base", "sr")


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.kind, c.data.name = "folder", ""
    c.data.path = ""
    c.data.embeddings = ""
    c.text.path = ""
    c.data.loader = "seqio"
    c.data.batch_size = 16
    c.data.max_text_len = c.text.max_len = 64
    c.data.min_size = 64
    c.pretrain_text.corpus = ""
    c.pretrain_text.steps = 200
    c.train.steps = 1500
    c.sampling.guidance_weight = 1.0
    return c
