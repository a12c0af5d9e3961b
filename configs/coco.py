"""COCO's images with five captions each, as TFDS prepares them: a small cascade 16 -> 64.

    python -m imagen_jax prepare --config=configs/coco.py:base
    python -m imagen_jax embed --config=configs/coco.py:base --config.text.path=T5_FOLDER
    python -m imagen_jax train --config=configs/coco.py:base --workdir=runs/coco/base
    python -m imagen_jax train --config=configs/coco.py:sr --workdir=runs/coco/sr

`prepare` downloads the data set (TFDS: coco_captions, tens of gigabytes) where `data.path` lacks
it. The networks are those of configs/shapes.py; for larger ones, copy the fields of `data` into
configs/imagen.py. Guidance weights are those of the paper's FID-30K on COCO: 1.35 for the base
stage, 8 for super-resolution.

Hardware: one host; a GPU or TPU for the training. Time and result: not yet run on the real images;
the tests run it on TFDS's mocked ones.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))
CONFIGS = {"base": 1.35, "sr": 8.0}  # Guidance weight of each stage.


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.kind = "tfds"
    c.data.name = "coco_captions/2014"
    c.data.path = "runs/coco/data"
    c.data.caption_key = "captions/text"
    c.data.fit = "random_crop"
    c.data.flip = True
    c.data.min_size = 64
    c.data.loader = "seqio"
    c.data.embeddings = "runs/coco/embeddings"
    c.data.max_text_len = c.text.max_len = 64
    c.text.path = ""
    c.pretrain_text.corpus = ""
    c.sampling.guidance_weight = CONFIGS[name]
    return c
