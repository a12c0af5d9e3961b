"""A super-resolution stage 16 -> 32 pixels on a folder of images, for two CPU cores.

    python -m imagen_jax train --config=examples/custom_stage.py:middle --workdir=runs/middle \
      --config.data.path=IMAGES --config.data.embeddings=EMBEDDINGS

A configuration is a file with a function `get_config(name)` that sets values. Fields that it does
not set have the defaults of `imagen_jax/config/schema.py`. In a cascade the exported stage follows
a base stage of 16 pixels: `--stages=base,middle,...`. Hardware: two CPU cores. Time and result: not
yet run on real images.
"""

import ml_collections

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config


def get_config(name: str = "middle") -> ml_collections.ConfigDict:
    """`middle`, or `wide` with twice the channels."""
    c = overrides.to_config_dict(Config())
    c.name = name

    # Input and output sizes.
    c.data.kind = "folder"
    c.data.lowres_size, c.data.image_size = 16, 32
    c.data.batch_size = 16
    c.data.loader = "numpy"
    c.data.max_text_len = c.text.max_len = 64

    # An Efficient U-Net of two levels, 16 and 8 after the patches of 2x2; text at the lower one.
    c.model.name = "efficient_unet"
    c.model.lowres = True
    c.model.patch_size = 2
    width = {"middle": 32, "wide": 64}[name]
    c.model.channels = (width, 2 * width)
    c.model.num_res_blocks = (1, 2)
    c.model.strided_stem = (False, True)
    c.model.self_attention = c.model.cross_attention = (False, True)
    c.model.head_dim = 32
    c.model.num_groups = 8

    # x0-prediction with a bounded weight trains fastest at this size; the network predicts the
    # difference to the upsampled low-resolution image.
    c.model.lowres_residual = True
    c.diffusion.prediction = "x0"
    c.diffusion.loss_weight = "truncated_v"
    c.diffusion.aug_level_max = 0.3

    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "linear_tail"
    c.ema.decay = 0.998
    c.train.steps = 3_000
    c.sampling.sampler, c.sampling.steps = "ddim", 12
    c.sampling.guidance_weight = 1.0
    c.sampling.aug_level = 0.1
    return c
