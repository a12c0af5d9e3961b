"""The shapes world: a cascade 16 -> 64 -> 256 that trains in minutes on two CPU cores.

    make demo        # the first two stages, see launch/demo.sh
    make demo_256    # then the third, see launch/demo_256.sh

`base` generates 16x16 images, `sr` upsamples 16 -> 64, `sr2` upsamples 64 -> 256 and trains on
crops.

Hardware: two CPU cores. Time: 6 to 13 minutes for `base` and `sr`, depending on the cores, 20 more
for `sr2`. Result: 0.94 of the held-out prompts of one object are exact, 0.72 of counts, 0.19 of
spatial relations (README.md).

data.loader is numpy, which gives the batches of seqio bit for bit: the core that reads is the core
that trains. A batch of `base` takes 4.3 ms of its time with numpy and 8.0 ms with seqio (400
batches, median of three interleaved runs), a step 76 ms.
"""

import ml_collections

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """Values of `base`, `sr` or `sr2`."""
    c = overrides.to_config_dict(Config())
    c.data.name = "shapes_world"
    c.data.path = "runs/demo/data"
    c.data.embeddings = "runs/demo/embeddings"
    c.text.path = "runs/demo/text"
    c.pretrain_text.corpus = "runs/demo/data/paraphrases.jsonl"
    c.pretrain_text.num_layers = 3
    c.pretrain_text.num_heads = 16  # Each starts at another relative position; relations need many.
    c.pretrain_text.batch_size = 32
    c.pretrain_text.steps = 1_200
    c.data.max_text_len = 24
    c.data.loader = "numpy"
    # Differs from paper: in one softmax with all pixels, text tokens get little attention at first.
    c.model.text_conditioning = "cross"
    c.checkpoint.every = 2_500  # A save costs as much as 30 steps.
    c.mesh.cpu_devices = 2
    c.diffusion.prediction = "x0"
    c.diffusion.loss_weight = "truncated_v"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.b2 = 0.99
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "linear_tail"
    c.ema.decay = 0.998
    c.sampling.sampler = "ddim"
    CONFIGS[name](c)
    c.name = name
    return c


def _base(c: ml_collections.ConfigDict) -> None:
    c.data.image_size = 16
    c.model.name = "unet"
    c.model.patch_size = 2
    c.model.channels = (48, 64)
    c.model.num_res_blocks = (1, 1)
    c.model.self_attention = c.model.cross_attention = (False, True)
    c.model.position_embedding = True  # Without it, "left of" takes longer than minutes.
    c.model.head_dim = 16
    c.model.num_groups = 8
    c.model.embed_dim = 256
    c.diffusion.logsnr_shift = -0.713  # 2 log 0.7
    c.data.batch_size = 16
    c.optimizer.learning_rate = 2e-3
    c.train.steps = 6_500
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 25
    c.sampling.guidance_weight = 1.5


def _sr(c: ml_collections.ConfigDict) -> None:
    c.data.image_size = 64
    c.data.lowres_size = 16
    c.model.name = "efficient_unet"
    c.model.lowres = c.model.lowres_residual = True
    c.model.patch_size = 2  # Patches of 4 take half the time; their outlines are rougher.
    c.model.channels = (32, 64, 64)
    c.model.num_res_blocks = (1, 1, 1)
    c.model.strided_stem = (False, True, True)
    c.model.self_attention = c.model.cross_attention = (False, False, True)
    c.model.head_dim = 32
    c.model.num_groups = 8
    c.model.embed_dim = 128
    c.diffusion.aug_level_max = 0.06  # The errors of the base stage are small.
    c.diffusion.aug_noise_size = "lowres"
    c.diffusion.logsnr_shift = -2.0
    c.data.batch_size = 8
    c.optimizer.learning_rate = 1e-3  # Sharper outlines than 3e-3.
    c.optimizer.schedule = "cosine"
    c.train.steps = 3_000
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 8
    c.sampling.guidance_weight = 2.0
    c.sampling.aug_level = 0.0


def _sr2(c: ml_collections.ConfigDict) -> None:
    _sr(c)
    c.data.name = "shapes_world256"
    c.data.crop_from = 256  # Trains on crops, samples whole images.
    c.model.self_attention = (False, False, False)
    c.diffusion.aug_level_max = 0.2
    c.diffusion.logsnr_shift = -3.0
    c.train.steps = 8_000
    c.ema.profiles = (0.2,)  # A wide average makes flat areas more even.
    c.ema.snapshot_every = 2_000
    c.sampling.guidance_weight = 1.0  # Off: lowres has the content, and it halves the time.


CONFIGS = {"base": _base, "sr": _sr, "sr2": _sr2}
