"""DeepFloyd IF's U-Nets, both ways: diffusers' `UNet2DConditionModel` folders <-> our U-Net.

IF has ADM's topology, as Imagen's base model has, with choices of its own that `ModelConfig` names
(`text_norm=group`, `noise_embedding=steps`, ...): `if_config` translates those, this module the
parameters. Their kernels are [out, in, h, w], ours [h, w, in, out]; their keys and values are two
layers each, ours one. The channels of an SR stage's input have the same order here and there:
noisy picture, then upsampled low-res picture.
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
)

# Our name of a layer -> theirs; a pair of theirs is one layer of ours, side by side.
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
      WeightsError: a file is missing or damaged, the configuration asks for something else than
        our U-Net has (the field is named), or the parameters do not fit the configuration.
    """
    folder = pathlib.Path(folder)
    config = model_config(read_config(folder), str(folder / "config.json"))
    arrays = weights.read_folder(folder, WEIGHT_FILES)
    shapes = parameter_shapes(config)
    names = {path: _names(path, config) for path in shapes}
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        # A view of one number has a shape to be turned, and costs nothing.
        parts = _theirs(path, np.broadcast_to(np.float32(0), leaf.shape), names[path])
        expected |= {name: part.shape for name, part in parts.items()}
    found = {name: array.shape for name, array in arrays.items()}
    weights.check_parameters(folder, found, expected)
    flat = {path: _ours(path, [arrays[n] for n in theirs]) for path, theirs in names.items()}
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
      folder: made if missing.
      config: shape of the network.
      params: its parameters, as `load` or `UNet.init` gives them.
      sample_size: side of the pictures, pixels.
      source: the config.json the network once came with; written again if it still describes it,
        so that fields without effect come back as they were.

    Raises:
      WeightsError: diffusers has no such network (the field is named), or the parameters do not
        fit the configuration.
    """
    values = diffusers_config(config, sample_size)
    network = dataclasses.replace(config, dtype="float32", remat="none")
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
        arrays |= _theirs(path, np.asarray(array), _names(path, config))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_safetensors(folder / WEIGHT_FILES[0], arrays)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape of each of our parameters, by path."""
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


def _names(path: str, config: ModelConfig) -> tuple[str, ...]:
    """Their names of one of our parameters, e.g. up_2_0_attention_self/key_value/kernel."""
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
    """Their name of one of our blocks; theirs count levels of the way up from the middle."""
    place, attention, _ = top.partition("_attention_")
    if place.startswith("middle"):
        index = 1 if place == "middle_out" else 0
        return f"mid_block.attentions.{index}" if attention else f"mid_block.resnets.{index}"
    way, level, index = place.split("_")
    blocks = f"{way}_blocks.{level if way == 'down' else last - int(level)}"
    if index == "resample":
        return f"{blocks}.{'downsamplers' if way == 'down' else 'upsamplers'}.0"
    return f"{blocks}.{'attentions' if attention else 'resnets'}.{index}"


def _turn(kernel: np.ndarray) -> np.ndarray:
    """[h, w, in, out] as [out, in, h, w], or [in, out] as [out, in]."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def _turn_back(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T


def _ours(path: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    arrays = [_turn_back(a) if path.endswith("/kernel") else a for a in arrays]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
    return np.ascontiguousarray(joined, np.float32)


def _theirs(path: str, array: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    parts = np.split(array, len(names), axis=-1)
    turned = [_turn(part) if path.endswith("/kernel") else part for part in parts]
    return dict(zip(names, turned, strict=True))
