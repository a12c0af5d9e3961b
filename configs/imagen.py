"""Imagen's three stages (arXiv:2205.11487, App. F): 64x64, 64 -> 256, 256 -> 1024.

    python -m imagen_jax train --config=configs/imagen.py:base_64 --workdir=runs/base_64 \
      --config.data.path=IMAGES --config.data.embeddings=EMBEDDINGS --config.mesh.fsdp=16

`base_64` generates 64x64 images, `sr_256` upsamples 64 -> 256, `sr_1024` upsamples 256 -> 1024 and
trains on crops. `base_64_300m`, `base_64_500m` and `base_64_1b` are narrower base stages, for the
ablation of the U-Net's size (Fig. 4b).

Hardware of the paper: 256 TPU v4 chips (base), 128 (each SR). Time and result: not yet run;
docs/plan.md estimates them. Paper is silent: token length, clip_norm, ema.decay, aug_schedule,
aug_level, sampling, and the number of blocks in the SR models' unstrided level.
"""

import ml_collections

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

# Width of the first level; the paper gives only the last.
BASE_WIDTHS = {"base_64_300m": 160, "base_64_500m": 224, "base_64_1b": 320, "base_64": 512}


def get_config(name: str = "base_64") -> ml_collections.ConfigDict:
    """Values of a stage in `CONFIGS`."""
    c = overrides.to_config_dict(Config())
    c.name = name
    c.data.kind = "folder"
    c.data.batch_size = 2048
    c.data.max_text_len = c.text.max_len = 128
    c.model.text_dim = 4096  # T5-XXL
    c.model.dtype = "bfloat16"
    CONFIGS[name](c)
    return c


def _base(c: ml_collections.ConfigDict) -> None:
    width = BASE_WIDTHS[c.name]
    c.data.image_size = 64
    c.model.channels = tuple(width * m for m in (1, 2, 3, 4))
    c.model.head_dim = 64 if width % 64 == 0 else 32
    c.optimizer.name = "adafactor"
    c.sampling.guidance_weight = 1.35


def _sr(c: ml_collections.ConfigDict) -> None:
    c.data.image_size, c.data.lowres_size = 256, 64
    c.model.name = "efficient_unet"
    c.model.lowres = True
    # The listed blocks, below the level at full resolution that only Fig. A.30 shows.
    c.model.channels = (128, 128, 256, 512, 1024)
    c.model.num_res_blocks = (1, 2, 4, 8, 8)
    c.model.strided_stem = (False, True, True, True, True)
    c.model.self_attention = c.model.cross_attention = (False, False, False, False, True)
    c.model.head_dim = 128  # 8 heads
    c.sampling.guidance_weight = 8.0
    c.sampling.aug_level = 0.2


def _sr_1024(c: ml_collections.ConfigDict) -> None:
    _sr(c)
    c.data.crop_from = 1024  # Trains 64 -> 256 on crops, samples whole images.
    c.model.self_attention = (False,) * 5
    c.model.text_conditioning = "cross"
    c.diffusion.schedule = "linear"


CONFIGS = dict.fromkeys(BASE_WIDTHS, _base) | {"sr_256": _sr, "sr_1024": _sr_1024}
