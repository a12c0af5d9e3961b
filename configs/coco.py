"""COCO's pictures with five captions each, as TFDS prepares them: a small cascade 16 -> 64.

    python -m imagen_jax prepare --config=configs/coco.py:base

`prepare` downloads and writes the data set (TFDS: coco_captions, tens of gigabytes) where it is not
there yet; then `embed` and `train` as with any other data, with --config.text.path=T5_FOLDER. The
networks are those of the shapes world: take the fields of `data` into configs/imagen.py for larger
ones. Hardware, time, result: not yet run on the real pictures; the tests run it on TFDS's mocked
ones.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

SHAPES = str(pathlib.Path(__file__).with_name("shapes.py"))


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base` or `sr`."""
    c = overrides.from_file(SHAPES, name)
    c.data.kind = "tfds"
    c.data.name = "coco_captions/2014"
    c.data.path = "runs/coco/data"
    c.data.caption_key = "captions/text"
    c.data.fit = "random_crop"
    c.data.flip = True
    c.data.min_size = 64
    c.data.embeddings = "runs/coco/embeddings"
    c.data.max_text_len = c.text.max_len = 64
    c.text.path = ""
    c.pretrain_text.corpus = ""
    c.sampling.guidance_weight = 1.35
    return c
