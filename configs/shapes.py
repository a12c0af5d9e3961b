"""The shapes world: a cascade 16 -> 64 -> 256 that learns in minutes on two CPU cores.

    make demo        # the first two stages, see launch/demo.sh
    make demo_256    # then the third, see launch/demo_256.sh

`base` draws 16x16, `sr` takes 16 -> 64, `sr2` takes 64 -> 256 and learns from crops, 16 -> 64. The
same fields at other values are the paper's models.
"""

import ml_collections

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config


def get_config(name: str = "base") -> ml_collections.ConfigDict:
    """`base`, `sr` or `sr2`."""
    c = overrides.to_config_dict(Config())
    c.data.path = "runs/demo/data"
    c.data.embeddings = "runs/demo/embeddings"
    c.text.path = "runs/demo/text"
    c.pretrain_text.corpus = "runs/demo/data/paraphrases.jsonl"
    c.pretrain_text.num_layers = 3
    c.pretrain_text.num_heads = 16  # Each begins by looking at another place: roles need many.
    c.pretrain_text.batch_size = 32
    c.pretrain_text.steps = 1_200
    c.data.max_text_len = 24
    c.data.loader = "numpy"  # The core that reads is the core that trains.
    # Beside all pixels in one softmax, as in the paper, a few words are hardly heard at first.
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
    {"base": _base, "sr": _sr, "sr2": _sr2}[name](c)
    c.name = name
    return c


def _base(c: ml_collections.ConfigDict) -> None:
    c.data.image_size = 16
    c.model.name = "unet"
    c.model.patch_size = 2
    c.model.channels = (48, 64)
    c.model.num_res_blocks = (1, 1)
    c.model.self_attention = c.model.cross_attention = (False, True)
    c.model.position_embedding = True  # Else "left of" comes too late for minutes.
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
    c.model.patch_size = 2  # Patches of 4 take half the time, but their outlines are rougher.
    c.model.channels = (32, 64, 64)
    c.model.num_res_blocks = (1, 1, 1)
    c.model.strided_stem = (False, True, True)
    c.model.self_attention = c.model.cross_attention = (False, False, True)
    c.model.head_dim = 32
    c.model.num_groups = 8
    c.model.embed_dim = 128
    c.model.skip_scale = 2**-0.5
    c.diffusion.aug_level_max = 0.06  # The errors of the base stage are small, too.
    c.diffusion.aug_noise_size = "lowres"
    c.diffusion.logsnr_shift = -2.0
    c.data.batch_size = 8
    c.optimizer.learning_rate = 1e-3  # Small steps draw sharper outlines than large ones.
    c.optimizer.schedule = "cosine"
    c.train.steps = 3_000
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 8
    c.sampling.guidance_weight = 2.0
    c.sampling.aug_level = 0.0


def _sr2(c: ml_collections.ConfigDict) -> None:
    _sr(c)
    c.data.name = "shapes_world256"
    c.data.crop_from = 256  # It learns from crops and draws the whole picture.
    c.model.self_attention = (False, False, False)
    c.diffusion.aug_level_max = 0.2
    c.diffusion.logsnr_shift = -3.0
    c.train.steps = 8_000
    c.ema.profiles = (0.2,)  # An average over much of the run: flat areas are the more even.
    c.ema.snapshot_every = 2_000
    c.sampling.guidance_weight = 1.0  # The small picture has said it all, in half the time.
