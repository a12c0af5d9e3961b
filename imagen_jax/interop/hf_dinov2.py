"""DINOv2 in the Hugging Face layout: `config.json` beside safetensors or torch weights.

The position embeddings of the public weights are for images of 518 pixels. For the 224 pixels of
FD-DINOv2 they are interpolated when they are read, as transformers does in every call: torch's
bicubic interpolation with aligned cell centres. (The authors' program scales that grid by a tenth
of a cell, which changes features slightly.)
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from imagen_jax.interop import weights
from imagen_jax.models.clip import ACTIVATIONS, ClipVisionConfig
from imagen_jax.models.dinov2 import ImageFeatures
from imagen_jax.parallel import partitioning

SIZE = 224

_NAMES = {
    "whole": "embeddings.cls_token",
    "places": "embeddings.position_embeddings",
    "patches/kernel": "embeddings.patch_embeddings.projection.weight",
    "patches/bias": "embeddings.patch_embeddings.projection.bias",
    "final_norm/scale": "layernorm.weight",
    "final_norm/bias": "layernorm.bias",
}
_PARTS = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "norm_1": "norm1",
    "norm_2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def read(folder: str | pathlib.Path, size: int) -> tuple[ClipVisionConfig, dict[str, Any], str]:
    """A DINOv2 for images of one size.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.
      size: side of the images, pixels; a multiple of the patch size.

    Returns:
      Its shape, the float32 parameters of `models.dinov2.ImageFeatures`, and the SHA-256 of the
      values in the files that are used.

    Raises:
      WeightsError: a file is missing or damaged, the model is not a DINOv2 with an ungated
        feed-forward layer, or its parameters do not match its config.json (all are named).
    """
    folder = pathlib.Path(folder)
    published = _read_config(folder / "config.json")
    unused = ("mask_token", "classifier.weight", "classifier.bias")
    found = weights.open_folder(folder, keep=lambda name: not name.endswith(unused))
    # Models with a head have this prefix.
    found = {name.removeprefix("dinov2."): tensor for name, tensor in found.items()}
    flat, digest = weights.read_as(folder, found, _expected(published), _transpose)
    flat["places"] = resize_position_embedding(flat["places"], size // published.patch_size)
    config = dataclasses.replace(published, image_size=size)
    return config, weights.unflatten(flat), digest


def resize_position_embedding(
    embedding: Float[np.ndarray, "n d"], side: int
) -> Float[np.ndarray, "m d"]:
    """Position embeddings for `side` x `side` patches; the first row, the class token's, stays."""
    old = round((len(embedding) - 1) ** 0.5)
    if old == side:
        return embedding
    matrix = bicubic(old, side)
    grid = embedding[1:].reshape(old, old, -1)
    resized = np.einsum("ia,jb,abd->ijd", matrix, matrix, grid).reshape(side * side, -1)
    return np.concatenate([embedding[:1], resized]).astype(np.float32)


def bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of torch's bicubic interpolation: no antialiasing, replicated border.

    The kernel is Keys' (1981) with a = -0.75; value i is taken at (i + 1/2) old / new - 1/2.
    """
    a, matrix = -0.75, np.zeros((new, old))
    for i in range(new):
        position = (i + 0.5) * old / new - 0.5
        first = int(np.floor(position)) - 1
        for tap in range(first, first + 4):
            x = abs(position - tap)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(tap, 0), old - 1)] += weight
    return matrix


def _read_config(path: pathlib.Path) -> ClipVisionConfig:
    values = weights.read_config(path, "a Hugging Face DINOv2 folder")
    if values.get("model_type") != "dinov2":
        raise weights.WeightsError(
            f"{path}: model_type={values.get('model_type')!r}, expected 'dinov2'"
        )
    activation = values.get("hidden_act", "gelu")
    if values.get("use_swiglu_ffn") or activation not in ACTIVATIONS:
        raise weights.WeightsError(
            f"{path}: use_swiglu_ffn={values.get('use_swiglu_ffn')}, hidden_act={activation!r}; "
            "the gated feed-forward layer (ViT-g) is not supported; use ViT-L/14, as FD-DINOv2 does"
        )
    width = values.get("hidden_size", 768)
    return ClipVisionConfig(
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 16),
        emb_dim=width,
        num_layers=values.get("num_hidden_layers", 12),
        num_heads=values.get("num_attention_heads", 12),
        mlp_dim=int(width * values.get("mlp_ratio", 4)),
        activation=activation,
        norm_eps=values.get("layer_norm_eps", 1e-6),
    )


def _expected(config: ClipVisionConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> name and shape in the files."""
    image = np.zeros((1, config.image_size, config.image_size, 3), np.float32)
    boxed = jax.eval_shape(ImageFeatures(config).init, jax.random.key(0), image)["params"]
    leaves = weights.flatten(partitioning.unbox(boxed))
    return {
        path: (_foreign_name(path), _foreign_shape(path, leaf.shape))
        for path, leaf in leaves.items()
    }


def _foreign_name(path: str) -> str:
    if path in _NAMES:
        return _NAMES[path]
    layer, _, part = path.partition("/")
    number = layer.removeprefix("layers_")
    if part.startswith("scale_"):
        return f"encoder.layer.{number}.layer_{part.replace('_', '')}.lambda1"
    part, _, kind = part.rpartition("/")
    return f"encoder.layer.{number}.{_PARTS[part]}.{'bias' if kind == 'bias' else 'weight'}"


def _foreign_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path == "patches/kernel":
        return (shape[3], shape[2], shape[0], shape[1])
    if path in ("whole", "places"):
        return (1,) * (3 - len(shape)) + shape
    return shape[::-1] if path.endswith("/kernel") else shape


def _transpose(path: str, array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    if path == "patches/kernel":
        return array.transpose(2, 3, 1, 0)
    if path in ("whole", "places"):
        return array[0, 0] if path == "whole" else array[0]
    return array.T if path.endswith("/kernel") else array
