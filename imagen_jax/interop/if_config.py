"""Fields of diffusers' `UNet2DConditionModel` as a ModelConfig, and back, for DeepFloyd IF.

A value that `models.unet.UNet` does not support is an error that names the field; likewise a value
of ModelConfig that diffusers does not support.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import ModelConfig
from imagen_jax.interop import weights
from imagen_jax.models.unet import UNet

DIFFUSERS_VERSION = "0.42.1"  # Version whose fields are written.

# Fields with one supported value; the first ones are also diffusers' defaults.
_ONLY = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "attention_type": "default",
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    # Values of IF:
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "text",
    "encoder_hid_dim_type": "text_proj",
}
# Defaults of diffusers for the other fields.
_DEFAULTS = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_norm": None,
    "resnet_time_scale_shift": "default",
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "class_embed_type": None,
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "dropout": 0.0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "sample_size": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
}
# Fields without effect for the blocks of IF, and the values that are written.
_WITHOUT_EFFECT = {
    "addition_time_embed_dim": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "reverse_transformer_layers_per_block": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
# Blocks of encoder and decoder, by whether they have attention.
_DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
_UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
_ACTIVATIONS = {"gelu": "gelu", "silu": "swish", "swish": "swish"}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(of, value))


# Kinds of values of the fields of _DEFAULTS that have many; the others are compared with a list.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "act_fn": (_is_text, "a name"),
    "addition_embed_type_num_heads": (_is_count, "a number"),
    "attention_head_dim": (lambda v: _is_count(v) or _is_list(v, _is_count), "numbers"),
    "block_out_channels": (lambda v: _is_list(v, _is_count), "numbers, one per level"),
    "cross_attention_dim": (_is_count, "a number"),
    "down_block_types": (lambda v: _is_list(v, _is_text), "names, one per level"),
    "up_block_types": (lambda v: _is_list(v, _is_text), "names, one per level"),
    "dropout": (lambda v: _is_number(v) and v < 1, "a number below 1"),
    "encoder_hid_dim": (_is_count, "a number"),
    "layers_per_block": (lambda v: _is_count(v) or _is_list(v, _is_count), "numbers"),
    "mid_block_only_cross_attention": (lambda v: v is None or _is_bool(v), "true, false or null"),
    "norm_num_groups": (_is_count, "a number"),
    "only_cross_attention": (lambda v: _is_bool(v) or _is_list(v, _is_bool), "true or false"),
    "resnet_out_scale_factor": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "sample_size": (lambda v: v is None or _is_count(v), "a number of pixels"),
    "time_embedding_dim": (lambda v: v is None or _is_count(v), "a number or null"),
}


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The fields of FOLDER/config.json. Raises WeightsError."""
    path = pathlib.Path(folder) / "config.json"
    return weights.read_config(path, "the unet folder of an IF model")


def model_config(given: Mapping[str, Any], where: str) -> ModelConfig:
    """ModelConfig of a UNet2DConditionModel.

    Args:
      given: its fields; missing ones have diffusers' defaults.
      where: name of the file for messages.

    Raises:
      WeightsError: `UNet` does not support the value of a field; the field is named.
    """
    values = _ONLY | _DEFAULTS | _WITHOUT_EFFECT | dict(given)
    if values["encoder_hid_dim_type"] is None and values["encoder_hid_dim"] is not None:
        values["encoder_hid_dim_type"] = "text_proj"
    try:
        _check(values)
        return _translate(values)
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise weights.WeightsError(f"{where}: {error}") from error


def _check(values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first field whose value `UNet` does not support."""

    def require(supported: bool, field: str, expected: Any) -> None:
        if not supported:
            raise ValueError(f"{field}={values[field]!r} cannot be represented, only {expected}")

    name = "UNet2DConditionModel"
    require(values.get("_class_name", name) == name, "_class_name", name)
    for field, expected in _ONLY.items():
        require(values[field] == expected, field, repr(expected))
    for field in values.keys() - _ONLY.keys() - _DEFAULTS.keys() - _WITHOUT_EFFECT.keys():
        require(field.startswith("_") or values[field] is None, field, "fields known here")

    for field, (valid, expected) in _KINDS.items():
        require(valid(values[field]), field, expected)

    down, up = values["down_block_types"], values["up_block_types"]
    for block in down:
        require(block in _DOWN.values(), "down_block_types", " and ".join(_DOWN.values()))
    mirrored = [_UP[block == _DOWN[True]] for block in reversed(down)]
    require(list(up) == mirrored, "up_block_types", f"those of down_block_types, {mirrored}")
    channels = values["block_out_channels"]
    require(len(channels) == len(down), "block_out_channels", f"{len(down)}, one per level")

    activation, lowres = values["act_fn"], values["class_embed_type"] is not None
    require(activation in _ACTIVATIONS, "act_fn", ", ".join(_ACTIVATIONS))
    # The activation of the embedding is applied in each block, or once for all blocks.
    act, skip = values["time_embedding_act_fn"], values["resnet_skip_time_act"]
    require(act in (None, activation), "time_embedding_act_fn", f"None or {activation!r}")
    require(skip == (act is not None), "resnet_skip_time_act", act is not None)
    divisor = values["resnet_out_scale_factor"]
    same = values["mid_block_scale_factor"] == divisor
    require(same, "mid_block_scale_factor", f"resnet_out_scale_factor={divisor}")
    require(values["class_embed_type"] in (None, "timestep"), "class_embed_type", "'timestep'")
    channels = 6 if lowres else 3
    fits = values["in_channels"] == channels
    require(fits, "in_channels", f"{channels} with this class_embed_type")
    require(values["out_channels"] in (3, 6), "out_channels", "3 or 6")
    heads = "addition_embed_type_num_heads"
    require(len(set(_levels(values, "attention_head_dim"))) == 1, "attention_head_dim", "one")
    width = values["encoder_hid_dim"]
    require(width % values[heads] == 0, heads, f"divisors of encoder_hid_dim={width}")


def _levels(values: Mapping[str, Any], field: str) -> tuple[Any, ...]:
    """A field with one value for all levels or one per level, as a value per level."""
    value, levels = values[field], len(values["down_block_types"])
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(value) != levels:
        raise ValueError(f"{field}={list(value)} must have {levels} entries, one per level")
    return value


def _translate(values: Mapping[str, Any]) -> ModelConfig:
    attends = tuple(block == _DOWN[True] for block in values["down_block_types"])
    text_only = _levels(values, "only_cross_attention")
    middle_text_only = values["mid_block_only_cross_attention"]
    if middle_text_only is None:
        middle_text_only = values["only_cross_attention"] is True
    return ModelConfig(
        name="unet",
        channels=tuple(values["block_out_channels"]),
        num_res_blocks=_levels(values, "layers_per_block"),
        self_attention=tuple(a and not t for a, t in zip(attends, text_only, strict=True)),
        cross_attention=attends,
        middle_attention=(not middle_text_only, True),
        text_conditioning="concat",
        text_pooling="token",
        pooling_heads=values["addition_embed_type_num_heads"],
        text_norm="group",
        text_dim=values["encoder_hid_dim"],
        text_width=values["cross_attention_dim"],
        noise_embedding="steps",
        activation=_ACTIVATIONS[values["act_fn"]],
        head_dim=_levels(values, "attention_head_dim")[0],
        num_groups=values["norm_num_groups"],
        embed_dim=values["time_embedding_dim"] or 4 * values["block_out_channels"][0],
        residual_divisor=float(values["resnet_out_scale_factor"]),
        skip_scale=1.0,
        dropout=float(values["dropout"]),
        lowres=values["class_embed_type"] is not None,
        out_channels=values["out_channels"],
    )


def diffusers_config(config: ModelConfig, sample_size: int | None) -> dict[str, Any]:
    """Fields of diffusers for a network.

    Args:
      config: shape of a `UNet`.
      sample_size: side of the images, pixels.

    Raises:
      WeightsError: diffusers does not support the value of a field; the field is named.
    """
    config = config.with_defaults(UNet.DEFAULTS)
    _check_model(config)
    activation = {"gelu": "gelu", "swish": "silu"}[config.activation]
    # Both values describe the same network; IF's SR networks, which have a divisor, use this one.
    once = config.residual_divisor != 1.0
    return (
        _ONLY
        | _WITHOUT_EFFECT
        | _only_text(config)
        | {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": activation,
            "addition_embed_type_num_heads": config.pooling_heads,
            "attention_head_dim": config.head_dim,
            "block_out_channels": list(config.channels),
            "class_embed_type": "timestep" if config.lowres else None,
            "cross_attention_dim": config.text_width,
            "down_block_types": [_DOWN[text] for text in config.cross_attention],
            "up_block_types": [_UP[text] for text in reversed(config.cross_attention)],
            "dropout": config.dropout,
            "encoder_hid_dim": config.text_dim,
            "in_channels": 6 if config.lowres else 3,
            "out_channels": config.out_channels,
            "layers_per_block": _once_if_same(config.num_res_blocks),
            "mid_block_scale_factor": config.residual_divisor,
            "norm_num_groups": config.num_groups,
            "resnet_out_scale_factor": config.residual_divisor,
            "resnet_skip_time_act": once,
            "sample_size": sample_size,
            "time_embedding_act_fn": activation if once else None,
            "time_embedding_dim": _width_unless_default(config),
        }
    )


def _check_model(config: ModelConfig) -> None:
    """Raises WeightsError for the first field whose value diffusers does not support."""
    required = {
        "name": "unet",
        "text_conditioning": "concat",
        "text_pooling": "token",
        "text_norm": "group",
        "noise_embedding": "steps",
        "patch_size": 1,
        "skip_scale": 1.0,
        "lowres_residual": False,
    }
    for field, expected in required.items():
        got = getattr(config, field)
        if got != expected:
            raise weights.WeightsError(
                f"config.model.{field}={got!r} cannot be represented in diffusers, only "
                f"{expected!r}"
            )
    if not config.text_width:
        raise weights.WeightsError(
            "config.model.text_width=0 cannot be represented in diffusers; set the width of "
            "the projection"
        )
    *_, (_, middle_text) = attends = _attends(config)
    if not middle_text or any(pixels and not text for pixels, text in attends):
        raise weights.WeightsError(
            f"config.model.cross_attention={config.cross_attention} cannot be represented in "
            "diffusers; the middle and every level with self-attention need cross-attention"
        )


def _attends(config: ModelConfig) -> list[tuple[bool, ...]]:
    """(self-attention, cross-attention) of each level and of the middle."""
    middle = config.middle_attention or (config.self_attention[-1], config.cross_attention[-1])
    return [*zip(config.self_attention, config.cross_attention, strict=True), middle]


def _only_text(config: ModelConfig) -> dict[str, Any]:
    """diffusers' fields for levels with cross-attention only."""
    attends = _attends(config)
    text_only = [not pixels for pixels, text in attends if text]
    # One value if all levels with attention agree.
    if len(set(text_only)) == 1:
        return {"only_cross_attention": text_only[0], "mid_block_only_cross_attention": None}
    each = [text and not pixels for pixels, text in attends[:-1]]
    return {"only_cross_attention": each, "mid_block_only_cross_attention": text_only[-1]}


def _width_unless_default(config: ModelConfig) -> int | None:
    default = 4 * config.channels[0]
    return None if config.embed_dim in (0, default) else config.embed_dim


def _once_if_same(values: tuple[Any, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)
