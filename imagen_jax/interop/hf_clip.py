"""CLIP's text tower in the Hugging Face layout: `config.json` beside safetensors or torch weights.

Whole CLIP models and text towers saved alone are read, with or without the prefix `text_model.`.
Their kernels are transposed. The last layer and the final norm must be there but are not used:
`models.clip` stops one layer before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from imagen_jax import partitioning
from imagen_jax.interop import weights
from imagen_jax.models import clip
from imagen_jax.models.clip import ClipTextConfig

# Our field -> theirs, and what a configuration without it means.
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

# What belongs to the vision tower and to both.
_OTHERS = ("vision_model.", "visual_projection.", "logit_scale")

# Of no use to the text encoder: a buffer of old files, and the head of the contrastive loss.
_IGNORED = ("embeddings.position_ids", "text_projection.weight")


def open_tensors(
    folder: str | pathlib.Path,
) -> tuple[ClipTextConfig, dict[str, weights.Tensor]]:
    """The text tower's shape, and its float32 parameters by path, read one at a time when asked.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.

    Raises:
      WeightsError: a file is missing or damaged, the model is not a CLIP, or its parameters do not
        fit its config.json (every missing, extra and wrong-shape one is named).
    """
    folder = pathlib.Path(folder)
    config = _read_config(folder / "config.json")
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
    # The last layer, which `models.clip` does without, is the next one of a deeper tower.
    everything = _expected(dataclasses.replace(config, num_layers=config.num_layers + 1))
    final = {f"final_layer_norm.{kind}": (config.emb_dim,) for kind in ("weight", "bias")}
    weights.check_parameters(
        folder,
        {name: tensor.shape for name, tensor in found.items()},
        {name: shape for _, (name, shape) in everything.items()} | final,
    )
    return config, {
        path: weights.Tensor(
            shape[::-1] if path.endswith("/kernel") else shape,
            functools.partial(_read, path, found[name]),
        )
        for path, (name, shape) in used.items()
    }


def _expected(config: ClipTextConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our path -> their name and shape, of all that `models.clip` uses."""
    leaves: Mapping = weights.flatten(partitioning.unbox(clip.boxed_shapes(config)))
    return {
        path: (
            _foreign_name(path),
            leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape,
        )
        for path, leaf in leaves.items()
    }


def _foreign_name(path: str) -> str:
    """Their name of our parameter, e.g. layers_2/attention/query/kernel."""
    if path == "token_embedder/embedding":
        return "embeddings.token_embedding.weight"
    if path == "position_embedder":
        return "embeddings.position_embedding.weight"
    number, part, kind = re.fullmatch(r"layers_(\d+)/(.+)/(\w+)", path).groups()
    return f"encoder.layers.{number}.{_PARTS[part]}.{'bias' if kind == 'bias' else 'weight'}"


def _read(path: str, tensor: weights.Tensor) -> np.ndarray:
    array = np.asarray(tensor.read()).astype(np.float32)
    return np.ascontiguousarray(array.T) if path.endswith("/kernel") else array


def _read_config(path: pathlib.Path) -> ClipTextConfig:
    if not path.is_file():
        raise weights.WeightsError(f"{path} is missing; a Hugging Face CLIP folder has one")
    try:
        values = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise weights.WeightsError(f"{path} is not a JSON object: {error}") from error
    kind = values.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise weights.WeightsError(
            f"{path}: model_type={kind!r}, expected 'clip' or 'clip_text_model'"
        )
    values = values.get("text_config", values)
    fields = {ours: values.get(theirs, old) for ours, (theirs, old) in _FIELDS.items()}
    if fields["activation"] not in clip.ACTIVATIONS:
        raise weights.WeightsError(
            f"{path}: hidden_act={fields['activation']!r}, expected one of "
            f"{', '.join(clip.ACTIVATIONS)}"
        )
    return ClipTextConfig(**fields)
