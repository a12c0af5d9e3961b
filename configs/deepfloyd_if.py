"""The base stage of DeepFloyd IF, IF-I-XL: 4.3 billion parameters, 64x64 pixels.

    python -m imagen_jax plan --config=configs/deepfloyd_if.py:xl --stage=sample --topology=v5e-8

For `plan`: memory and time of sampling, or of a LoRA, before the weights are downloaded; the values
are those of the public unet/config.json. `import if` reads them from a downloaded folder itself
(docs/models.md).

Hardware: not yet run. Time: docs/models.md estimates it. Result: not yet run.
"""

import ml_collections

from imagen_jax.config import overrides
from imagen_jax.config.data import DataConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.interop import if_config

UNET = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "block_out_channels": (704, 1408, 2112, 2816),
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
}


CONFIGS = ("xl",)


def get_config(name: str = "xl") -> ml_collections.ConfigDict:
    """Values of `xl`."""
    if name not in CONFIGS:
        raise KeyError(name)
    return overrides.to_config_dict(
        Config(
            name="if_base",
            data=DataConfig(image_size=64, max_text_len=77, batch_size=8),
            model=if_config.model_config(UNET, "configs/deepfloyd_if.py"),
            sampling=SamplingConfig(
                steps=100, spacing="leading", guidance_weight=7.0, variance="learned"
            ),
        )
    )
