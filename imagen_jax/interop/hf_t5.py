"""T5 encoders in the Hugging Face layout: `config.json` beside safetensors or torch weights.

`load` converts a published T5 (v1.0 or v1.1, with or without decoder) to the parameter names
of `models.t5`; `save` writes a folder that `load` and Hugging Face's library read. In the files
kernels are transposed and the relative bias is [buckets, heads].
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from imagen_jax.config.text import T5Config
from imagen_jax.interop import weights
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning

# feed_forward_proj -> mlp_activations. "gelu_new" and "gated-gelu" are the tanh form.
_FEED_FORWARD = {
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
    "relu": ("relu",),
    "gelu_new": ("gelu",),
}

_FIELDS = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
}

# Values of published configurations that are older than these fields.
_OLD_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}


_UMT5 = ", which has a relative bias per layer; only T5 v1.0, v1.1 and ByT5 are read"


def load(folder: str | pathlib.Path) -> tuple[T5Config, dict[str, Any]]:
    """Reads the encoder of a Hugging Face T5; a decoder beside it is ignored.

    Args:
      folder: holds config.json and model.safetensors or pytorch_model.bin, whole or sharded.

    Returns:
      The encoder's shape, and its float32 parameters as nested dicts of NumPy arrays.

    Raises:
      WeightsError: a file is missing or damaged, the model is not a T5, or its parameters do not
        match its config.json (every missing, extra and wrong-shape one is named).
    """
    config, tensors = open_tensors(folder)
    return config, weights.unflatten({path: tensor.read() for path, tensor in tensors.items()})


def open_tensors(folder: str | pathlib.Path) -> tuple[T5Config, dict[str, weights.Tensor]]:
    """As `load`, by path (`layers_0/mlp/wo/kernel`); each tensor is read by `Tensor.read`."""
    folder = pathlib.Path(folder)
    config = _read_config(folder / "config.json")
    found = weights.open_folder(
        folder, keep=lambda name: name == "shared.weight" or name.startswith("encoder.")
    )
    # The encoder's embedding table has a second name.
    tied = found.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        found.setdefault("shared.weight", tied)
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in found:
        raise weights.WeightsError(f"{folder} is a umT5{_UMT5}")
    expected = weights.flatten(t5.parameter_shapes(config))
    names = {path: _foreign_name(path) for path in expected}
    weights.check_parameters(
        folder,
        {name: tensor.shape for name, tensor in found.items()},
        {names[path]: _foreign_shape(path, leaf.shape) for path, leaf in expected.items()},
    )
    return config, {
        path: weights.Tensor(leaf.shape, functools.partial(_read, path, found[names[path]]))
        for path, leaf in expected.items()
    }


def _read(path: str, tensor: weights.Tensor) -> np.ndarray:
    return _transposed(path, tensor.read())


def save(folder: str | pathlib.Path, config: T5Config, params: dict[str, Any]) -> None:
    """Writes config.json and model.safetensors; `load` returns the same float32 values.

    Args:
      folder: created if missing.
      config: shape of the encoder.
      params: parameters as of `load` or `T5Encoder.init`.

    Raises:
      WeightsError: the parameters do not match the configuration.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = weights.flatten(jax.device_get(partitioning.unbox(params)))
    expected = weights.flatten(t5.parameter_shapes(config))
    weights.check_parameters(
        "the encoder to save",
        {path: np.shape(array) for path, array in flat.items()},
        {path: leaf.shape for path, leaf in expected.items()},
    )
    arrays = {_foreign_name(path): _transposed(path, array) for path, array in flat.items()}
    weights.write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(_foreign_config(config), indent=2) + "\n")


def _read_config(path: pathlib.Path) -> T5Config:
    values = _OLD_DEFAULTS | weights.read_config(path, "a Hugging Face T5 folder")
    kind = values.get("model_type")
    if kind == "umt5":
        raise weights.WeightsError(f"{path} is of a umT5{_UMT5}")
    if kind != "t5":
        raise weights.WeightsError(f"{path}: model_type={kind!r}, expected 't5'")
    missing = sorted(name for name in _FIELDS.values() if name not in values)
    if missing:
        raise weights.WeightsError(f"{path} lacks {', '.join(missing)}")
    activation = values["feed_forward_proj"]
    if activation not in _FEED_FORWARD:
        raise weights.WeightsError(
            f"{path}: feed_forward_proj={activation!r}, expected one of {', '.join(_FEED_FORWARD)}"
        )
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    return T5Config(**fields, mlp_activations=_FEED_FORWARD[activation])


def _foreign_config(config: T5Config) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _FEED_FORWARD.items()}
    if config.mlp_activations not in names:
        raise weights.WeightsError(
            f"mlp_activations={config.mlp_activations} has no name in the Hugging Face layout"
        )
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "feed_forward_proj": names[config.mlp_activations],
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def _foreign_name(path: str) -> str:
    """Name in the files of a parameter such as layers_2/mlp/wo/kernel."""
    parts = path.split("/")
    if parts[0] == "token_embedder":
        return "shared.weight"
    if parts[0] == "relpos_bias":
        return "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if parts[0] == "encoder_norm":
        return "encoder.final_layer_norm.weight"
    block = f"encoder.block.{parts[0].removeprefix('layers_')}"
    if parts[1] == "attention":
        return f"{block}.layer.0.SelfAttention.{parts[2][0]}.weight"
    if parts[1] == "mlp":
        return f"{block}.layer.1.DenseReluDense.{parts[2]}.weight"
    sublayer = 0 if parts[1] == "pre_attention_layer_norm" else 1
    return f"{block}.layer.{sublayer}.layer_norm.weight"


def _is_transposed(path: str) -> bool:
    return path.endswith(("/kernel", "/rel_embedding"))


def _foreign_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _is_transposed(path) else shape


def _transposed(path: str, array: np.ndarray) -> np.ndarray:
    """The array in the other layout, float32; its own inverse."""
    array = np.asarray(array).astype(np.float32)
    return np.ascontiguousarray(array.T) if _is_transposed(path) else array
