"""CLIP in the Hugging Face layout: `config.json` beside safetensors or torch weights.

`open_tensors`, for the text encoder, reads whole CLIP models and separate text towers, with or
without the prefix `text_model.`. The last layer and the final norm must exist but are not used:
`models.clip.TextTower` ends one layer earlier. `read_towers`, for the CLIP score, needs the whole
model. Kernels are transposed in the files.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from imagen_jax.interop import weights
from imagen_jax.models import clip
from imagen_jax.models.clip import ClipTextConfig, ClipVisionConfig
from imagen_jax.parallel import partitioning

# Field -> field of config.json, and its default there.
_FIELDS = {
    "vocab_size": ("vocab_size", 49408),
    "emb_dim": ("hidden_size", 512),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 8),
    "mlp_dim": ("intermediate_size", 2048),
    "positions": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
    "norm_eps": ("layer_norm_eps", 1e-5),
}

_VISION_FIELDS = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "emb_dim": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "activation": ("hidden_act", "quick_gelu"),
    "norm_eps": ("layer_norm_eps", 1e-5),
}

_PARTS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "norm_1": "layer_norm1",
    "norm_2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}

# Parameters outside the layers, of the text tower and of the image tower.
_TEXT_NAMES = {
    "token_embedder/embedding": "text_model.embeddings.token_embedding.weight",
    "position_embedder": "text_model.embeddings.position_embedding.weight",
    "final_norm/scale": "text_model.final_layer_norm.weight",
    "final_norm/bias": "text_model.final_layer_norm.bias",
    "projection/kernel": "text_projection.weight",
}
_VISION_NAMES = {
    "class_embedder": "vision_model.embeddings.class_embedding",
    "patch_embedder/kernel": "vision_model.embeddings.patch_embedding.weight",
    "position_embedder": "vision_model.embeddings.position_embedding.weight",
    # Misspelled in the files.
    "first_norm/scale": "vision_model.pre_layrnorm.weight",
    "first_norm/bias": "vision_model.pre_layrnorm.bias",
    "final_norm/scale": "vision_model.post_layernorm.weight",
    "final_norm/bias": "vision_model.post_layernorm.bias",
    "projection/kernel": "visual_projection.weight",
}

# Not used by the text encoder: a buffer of old files, and the projection of the contrastive loss.
_IGNORED = ("embeddings.position_ids", "text_projection.weight")


def open_tensors(
    folder: str | pathlib.Path,
) -> tuple[ClipTextConfig, dict[str, weights.Tensor]]:
    """The text tower's shape, and its float32 parameters by path, not read yet.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.

    Raises:
      WeightsError: a file is missing or damaged, the model is not a CLIP, or its parameters do not
        match its config.json (every missing, extra and wrong-shape one is named).
    """
    folder = pathlib.Path(folder)
    values = _read_config(folder / "config.json")
    fields = _fields(values.get("text_config", values), _FIELDS, folder / "config.json")
    config = ClipTextConfig(**fields)
    found = weights.open_folder(
        folder,
        keep=lambda name: (
            not name.startswith(("vision_model.", "visual_projection", "logit_scale"))
        ),
    )
    found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    for name in _IGNORED:
        found.pop(name, None)
    used = _expected(config)
    # The last layer, which `TextTower` omits, is the next layer of a deeper tower.
    whole_tower = _expected(dataclasses.replace(config, num_layers=config.num_layers + 1))
    final = {f"final_layer_norm.{kind}": (config.emb_dim,) for kind in ("weight", "bias")}
    weights.check_parameters(
        folder,
        {name: tensor.shape for name, tensor in found.items()},
        {name: shape for _, (name, shape) in whole_tower.items()} | final,
    )
    return config, {
        path: weights.Tensor(
            shape[::-1] if path.endswith("/kernel") else shape,
            functools.partial(_read, path, found[name]),
        )
        for path, (name, shape) in used.items()
    }


class Towers(NamedTuple):
    """A whole CLIP.

    Attributes:
      text, vision: shapes of its towers.
      projection_dim: width of an embedding.
      text_params: of `models.clip.TextEmbedding`, float32.
      vision_params: of `models.clip.ImageEmbedding`, float32.
      sha256: of all values.
    """

    text: ClipTextConfig
    vision: ClipVisionConfig
    projection_dim: int
    text_params: dict[str, Any]
    vision_params: dict[str, Any]
    sha256: str


def read_towers(folder: str | pathlib.Path) -> Towers:
    """Reads both towers with their projections.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.

    Raises:
      WeightsError: as `open_tensors`, also if the model has no image tower.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    values = _read_config(path)
    if "vision_config" not in values:
        raise weights.WeightsError(f"{path} has no vision_config; a CLIP score needs a whole CLIP")
    text = ClipTextConfig(**_fields(values.get("text_config", {}), _FIELDS, path))
    vision = ClipVisionConfig(**_fields(values["vision_config"], _VISION_FIELDS, path))
    dim = int(values.get("projection_dim", 512))
    keep = lambda name: not name.endswith("position_ids") and name != "logit_scale"  # noqa: E731
    found = weights.open_folder(folder, keep=keep)
    flat, digest = weights.read_as(folder, found, _expected_towers(text, vision, dim), _transpose)
    tree = weights.unflatten(flat)
    return Towers(text, vision, dim, tree["text"], tree["vision"], digest)


def _expected_towers(
    text: ClipTextConfig, vision: ClipVisionConfig, dim: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path, after text/ or vision/ -> name and shape in the files."""
    ids = np.zeros((1, 2), np.int32)
    image = np.zeros((1, vision.image_size, vision.image_size, 3), np.float32)
    towers = {
        "text": (clip.TextEmbedding(text, dim), (ids, ids == 0), _TEXT_NAMES),
        "vision": (clip.ImageEmbedding(vision, dim), (image,), _VISION_NAMES),
    }
    expected = {}
    for tower, (module, inputs, names) in towers.items():
        boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        for path, leaf in weights.flatten(partitioning.unbox(boxed)).items():
            name = names.get(path) or f"{tower}_model.{_foreign_name(path)}"
            expected[f"{tower}/{path}"] = (name, _foreign_shape(path, leaf.shape))
    return expected


def _foreign_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter in the files."""
    if path == "patch_embedder/kernel":
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if path.endswith("/kernel") else shape


def _expected(config: ClipTextConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path of `TextTower` -> name and shape in the files."""
    leaves: Mapping = weights.flatten(partitioning.unbox(clip.boxed_shapes(config)))
    return {
        path: (_foreign_name(path), _foreign_shape(path, leaf.shape))
        for path, leaf in leaves.items()
    }


def _foreign_name(path: str) -> str:
    """Name in the files of a parameter such as layers_2/attention/query/kernel."""
    if path == "token_embedder/embedding":
        return "embeddings.token_embedding.weight"
    if path == "position_embedder":
        return "embeddings.position_embedding.weight"
    ((number, part, kind),) = re.findall(r"^layers_(\d+)/(.+)/(\w+)$", path)
    return f"encoder.layers.{number}.{_PARTS[part]}.{'bias' if kind == 'bias' else 'weight'}"


def _read(path: str, tensor: weights.Tensor) -> np.ndarray:
    return np.ascontiguousarray(_transpose(path, np.asarray(tensor.read()).astype(np.float32)))


def _transpose(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith("patch_embedder/kernel"):
        return array.transpose(2, 3, 1, 0)
    return array.T if path.endswith("/kernel") else array


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """The content of config.json."""
    values = weights.read_config(path, "a Hugging Face CLIP folder")
    kind = values.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise weights.WeightsError(
            f"{path}: model_type={kind!r}, expected 'clip' or 'clip_text_model'"
        )
    return values


def _fields(
    values: Mapping[str, Any], names: Mapping[str, tuple[str, Any]], path: pathlib.Path
) -> dict[str, Any]:
    """Fields of a tower's configuration from its section of config.json."""
    fields = {field: values.get(name, default) for field, (name, default) in names.items()}
    if fields["activation"] not in clip.ACTIVATIONS:
        raise weights.WeightsError(
            f"{path}: hidden_act={fields['activation']!r}, expected one of "
            f"{', '.join(clip.ACTIVATIONS)}"
        )
    return fields
