"""A folder of captioned images: a small cascade.

    bash launch/folder.sh IMAGES RUN_FOLDER

`base` and `sr`, 16 -> 64, are for CPUs: the networks and settings of configs/emoji.py. `base_64`
and `sr_256`, 64 -> 256, are for one accelerator. launch/folder.sh chooses among them and sets
`train.steps` by the number of images.

Hardware: two CPU cores, or one GPU or TPU chip. Time and result: docs/own_images.md. Not yet run:
`base_64` and `sr_256`.

data.loader is numpy for the reason given in configs/shapes.py.
"""

import pathlib

import ml_collections

from imagen_jax.config import overrides

EMOJI = str(pathlib.Path(__file__).with_name("emoji.py"))
CONFIGS = ("base", "sr", "base_64", "sr_256")


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of a stage."""
    c = overrides.from_file(EMOJI, name.split("_")[0])
    c.name = name
    c.data.kind, c.data.name = "folder", ""
    c.data.path = ""
    c.data.captions = {}
    c.data.embeddings = ""
    c.data.max_text_len = c.text.max_len = 64
    c.data.min_size = c.data.image_size = int(name.partition("_")[2] or c.data.image_size)
    c.data.min_size = max(c.data.min_size, 64)
    c.text.encoder, c.text.path = "t5", ""
    c.pretrain_text.steps = 200
    c.train.steps = 3_000
    c.sampling.guidance_weight = 1.0
    if name == "base_64":
        _large(c)
        c.model.channels = (128, 256, 384, 512)
        c.model.num_res_blocks = (2, 2, 2, 2)
        c.model.self_attention = c.model.cross_attention = (False, False, True, True)
        c.model.patch_size = 1
        c.data.batch_size = 64
        c.optimizer.learning_rate = 3e-4
    elif name == "sr_256":
        _large(c)
        c.data.lowres_size = 64
        c.model.channels = (64, 128, 256)
        c.model.num_res_blocks = (1, 2, 4)
        c.diffusion.logsnr_shift = -3.0
        c.data.batch_size = 32
        c.optimizer.learning_rate = 3e-4
    return c


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.dtype = "bfloat16"
    c.model.head_dim = 64
    c.model.num_groups = 32
    c.model.embed_dim = 0
    c.mesh.cpu_devices = 1
    c.ema.decay = 0.999
