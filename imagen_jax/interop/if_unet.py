"""DeepFloyd IF's U-Nets: diffusers' `UNet2DConditionModel` folders <-> `models.unet.UNet`.

IF has ADM's topology, like Imagen's base model, with variants that `ModelConfig` selects
(`text_norm=group`, `noise_embedding=steps`, ...). `if_config` translates the fields, this module
the parameters. Kernels of diffusers are [out, in, h, w], those of `UNet` [h, w, in, out]; keys and
values are two layers in diffusers and one in `UNet`. The input channels of an SR stage have the
same order in both: noisy image, then upsampled low-resolution image.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import ModelConfig
from imagen_jax.interop import weights
from imagen_jax.interop.if_config import diffusers_config, model_config, read_config
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import partitioning

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)

# Layer of `UNet` -> layers of diffusers, concatenated along the output channels.
_CONDITIONING = {
    "noise/hidden": ("time_embedding.linear_1",),
    "noise/out": ("time_embedding.linear_2",),
    "lowres_noise/hidden": ("class_embedding.linear_1",),
    "lowres_noise/out": ("class_embedding.linear_2",),
    "text_projection": ("encoder_hid_proj",),
    "pooling/norm_in": ("add_embedding.norm1",),
    "pooling/query": ("add_embedding.pool.q_proj",),
    "pooling/key_value": ("add_embedding.pool.k_proj", "add_embedding.pool.v_proj"),
    "pooling/out": ("add_embedding.proj",),
    "pooling/norm_out": ("add_embedding.norm2",),
}
_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
_BLOCK_LAYERS = {
    "norm_in": ("norm1",),
    "conv_in": ("conv1",),
    "modulation": ("time_emb_proj",),
    "norm_out": ("norm2",),
    "conv_out": ("conv2",),
    "shortcut": ("conv_shortcut",),
}
_ATTENTION_LAYERS = {
    "norm": ("group_norm",),
    "text_norm": ("norm_cross",),
    "query": ("to_q",),
    "key_value": ("to_k", "to_v"),
    "text_key_value": ("add_k_proj", "add_v_proj"),
    "out": ("to_out.0",),
}


def load(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a U-Net of IF.

    Args:
      folder: holds config.json and diffusion_pytorch_model.safetensors or .bin, whole or sharded.

    Returns:
      The shape of the network, and its float32 parameters as nested dicts of NumPy arrays.

    Raises:
      WeightsError: a file is missing or damaged, `UNet` does not support the value of a field (the
        field is named), or the parameters do not match the configuration.
    """
    folder = pathlib.Path(folder)
    config = model_config(read_config(folder), str(folder / "config.json"))
    arrays = weights.read_folder(folder, WEIGHT_FILES)
    shapes = parameter_shapes(config)
    names = {path: diffusers_names(path, config) for path in shapes}
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        # A broadcast scalar: the shape of the transposed array without its memory.
        parts = _to_diffusers(path, np.broadcast_to(np.float32(0), leaf.shape), names[path])
        expected |= {name: part.shape for name, part in parts.items()}
    found = {name: array.shape for name, array in arrays.items()}
    weights.check_parameters(folder, found, expected)
    flat = {path: _from_diffusers(path, [arrays[n] for n in own]) for path, own in names.items()}
    return config, weights.unflatten(flat)


def save(
    folder: str | pathlib.Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    sample_size: int | None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors for diffusers.

    Args:
      folder: created if missing.
      config: shape of the network.
      params: parameters of `UNet` as nested dicts of plain arrays.
      sample_size: side of the images, pixels.
      source: config.json of the imported network; written unchanged if it still describes
        `config`, so that fields without effect are kept.

    Raises:
      WeightsError: diffusers does not support the network (the field is named), or the parameters
        do not match the configuration.
    """
    values = diffusers_config(config, sample_size)
    network = config.with_defaults(UNet.DEFAULTS)
    network = dataclasses.replace(network, dtype="float32", remat="none")
    if source is not None and model_config(source, "the imported config.json") == network:
        values = dict(source)
    flat = weights.flatten(jax.device_get(params))
    weights.check_parameters(
        "the U-Net to save",
        {path: np.shape(array) for path, array in flat.items()},
        {path: leaf.shape for path, leaf in parameter_shapes(config).items()},
    )
    arrays: dict[str, np.ndarray] = {}
    for path, array in flat.items():
        arrays |= _to_diffusers(path, np.asarray(array), diffusers_names(path, config))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_safetensors(folder / WEIGHT_FILES[0], arrays)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters of `UNet`, by path."""
    side = 2 ** (len(config.channels) - 1)
    one = jnp.zeros((1,))
    arguments = (
        jnp.zeros((1, side, side, 6 if config.lowres else 3)),
        one,
        jnp.zeros((1, 2, config.text_dim)),
        jnp.ones((1, 2), bool),
        one if config.lowres else None,
    )
    variables = jax.eval_shape(lambda: UNet(config).init(jax.random.key(0), *arguments))
    return weights.flatten(partitioning.unbox(variables["params"]))


def diffusers_names(path: str, config: ModelConfig) -> tuple[str, ...]:
    """Names in diffusers of a parameter such as up_2_0_attention_self/key_value/kernel."""
    top, *inner, leaf = path.split("/")
    last = len(config.channels) - 1
    if path == "cond/pooling/position":
        return ("add_embedding.pool.positional_embedding",)
    if top in _ENDS:
        prefix, layers = "", (_ENDS[top],)
    elif top == "cond":
        prefix, layers = "", _CONDITIONING["/".join(inner)]
    else:
        table = _ATTENTION_LAYERS if "_attention_" in top else _BLOCK_LAYERS
        prefix, layers = _block(top, last) + ".", table[inner[0]]
    suffix = "bias" if leaf == "bias" else "weight"
    return tuple(f"{prefix}{layer}.{suffix}" for layer in layers)


def _block(top: str, last: int) -> str:
    """Name in diffusers of a block; diffusers counts the levels of the decoder from the middle."""
    block, attention, _ = top.partition("_attention_")
    if block.startswith("middle"):
        index = 1 if block == "middle_out" else 0
        return f"mid_block.attentions.{index}" if attention else f"mid_block.resnets.{index}"
    direction, level, index = block.split("_")
    blocks = f"{direction}_blocks.{level if direction == 'down' else last - int(level)}"
    if index == "resample":
        return f"{blocks}.{'downsamplers' if direction == 'down' else 'upsamplers'}.0"
    return f"{blocks}.{'attentions' if attention else 'resnets'}.{index}"


def _transpose(kernel: np.ndarray) -> np.ndarray:
    """[h, w, in, out] as [out, in, h, w], or [in, out] as [out, in]."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def _transpose_back(kernel: np.ndarray) -> np.ndarray:
    """Inverse of `_transpose`."""
    return kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T


def _from_diffusers(path: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    arrays = [_transpose_back(a) if path.endswith("/kernel") else a for a in arrays]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
    return np.ascontiguousarray(joined, np.float32)


def _to_diffusers(path: str, array: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    parts = np.split(array, len(names), axis=-1)
    arrays = [_transpose(part) if path.endswith("/kernel") else part for part in parts]
    return dict(zip(names, arrays, strict=True))
