"""LoRAs of DeepFloyd IF's U-Nets in the formats of diffusers and peft.

Both name an update by its layer: `LAYER.lora_A.weight` [r, in] and `LAYER.lora_B.weight` [out, r],
of a convolution [r, in, h, w] and [out, r, 1, 1]. diffusers writes one file, with the layers under
`unet.`; peft a folder with adapter_config.json, under `base_model.model.`. Earlier names of
diffusers (`lora.down`, `lora.up`, `processor.to_q_lora`) are read, too. Keys and values are two
layers here and one in `UNet`.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from imagen_jax.config.schema import ModelConfig
from imagen_jax.interop import if_unet, weights
from imagen_jax.interop.if_config import diffusers_config
from imagen_jax.interop.weights import WeightsError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"

# A and B as they are, in the order of stages.lora.Factors, the scale included.
Pair = tuple[np.ndarray, np.ndarray]

_PREFIXES = ("base_model.model.", "unet.")
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up)(?:\.default)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(\w+)_lora\.(down|up)\.weight")


def is_lora(path: str | pathlib.Path) -> bool:
    """Whether `path` is a LoRA of diffusers or peft: a .safetensors file, or a folder with one."""
    path = pathlib.Path(path)
    if path.is_dir():
        return (path / PEFT_FILE).is_file() or (path / DIFFUSERS_FILE).is_file()
    return path.suffix == ".safetensors" and path.is_file()


def is_representable(config: ModelConfig) -> bool:
    """Whether diffusers has a network of this shape."""
    try:
        diffusers_config(config, None)
    except WeightsError:
        return False
    return True


def read(path: str | pathlib.Path, config: ModelConfig) -> dict[str, Pair]:
    """Reads a LoRA of diffusers or peft.

    Args:
      path: peft's folder, or diffusers' file or its folder.
      config: the network that it updates.

    Returns:
      Path of a kernel of `UNet` -> A [in, r] or [h, w, in, r], and B [r, out] times the scale.

    Raises:
      WeightsError: a file is missing or damaged, or an update is of no layer of the network.
    """
    path = pathlib.Path(path)
    file, settings = path, {}
    if path.is_dir():
        file = path / (PEFT_FILE if (path / PEFT_FILE).is_file() else DIFFUSERS_FILE)
        if file.name == PEFT_FILE:
            settings = weights.read_config(path / PEFT_CONFIG, "a LoRA of peft")
    arrays = {name: np.asarray(a) for name, a in weights.read_safetensors(file).items()}
    settings = settings or _metadata(file)
    if settings.get("use_dora"):
        raise WeightsError(f"{file}: use_dora=true is not supported, only plain LoRA")
    layers = _layers(arrays, file)
    names = _layer_names(config)
    known = {layer for own in names.values() for layer in own}
    if unknown := sorted(layers.keys() - known):
        raise WeightsError(
            f"{file} is of another network: config.model has no layer {', '.join(unknown[:5])}"
        )
    scales = {
        layer: _scale(layer, a.shape[0], arrays, settings) for layer, (a, _) in layers.items()
    }
    found: dict[str, Pair] = {}
    shapes = if_unet.parameter_shapes(config)
    for kernel, own in names.items():
        if not any(layer in layers for layer in own):
            continue
        width = shapes[f"{kernel}/kernel"].shape[-1] // len(own)
        parts = [(layers.get(layer), scales.get(layer, 1.0)) for layer in own]
        found[kernel] = _joined(parts, width)
    return found


def _metadata(file: pathlib.Path) -> dict[str, Any]:
    """The settings of peft that diffusers keeps in a file; {}: none."""
    with safetensors.safe_open(file, "numpy") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    values = json.loads(text) if text else {}
    return {name.removeprefix("unet."): value for name, value in values.items()}


def _layers(arrays: Mapping[str, np.ndarray], file: pathlib.Path) -> dict[str, Pair]:
    """Layer -> A [r, in, ...], B [out, r, ...], float32."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        short = _without_prefix(name)
        old, match = _PROCESSOR.fullmatch(short), _FACTOR.fullmatch(short)
        if old:
            layer = f"{old[1]}.{'to_out.0' if old[2] == 'to_out' else old[2]}"
            kind = old[3]
        elif match:
            layer, kind = match[1], match[2]
        elif short.endswith(".alpha"):
            continue
        else:
            raise WeightsError(f"{file}: {name} is no factor of a LoRA of a U-Net")
        kind = "a" if kind in ("lora_A", "lora.down", "down") else "b"
        parts.setdefault(layer, {})[kind] = array.astype(np.float32)
    for layer, pair in parts.items():
        if len(pair) < 2:
            raise WeightsError(f"{file}: {layer} has only one of the factors A and B")
    return {layer: (pair["a"], pair["b"]) for layer, pair in parts.items()}


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _scale(
    layer: str, rank: int, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> float:
    """alpha / rank of a layer, as peft and diffusers find it."""
    for name in (f"{layer}.alpha", f"unet.{layer}.alpha"):
        if name in arrays:
            return float(arrays[name]) / rank
    alpha = _of_layer(layer, settings.get("alpha_pattern")) or settings.get("lora_alpha", rank)
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _of_layer(layer: str, pattern: Mapping[str, Any] | None) -> Any:
    """The value of peft's pattern that a layer's name ends with; None: there is none."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return None


def _joined(parts: Sequence[tuple[Pair | None, float]], width: int) -> Pair:
    """The update of layers that are one kernel: A side by side, B in blocks."""
    columns, rows = [], []
    for index, (pair, scale) in enumerate(parts):
        if pair is None:
            continue
        a, b = pair
        columns.append(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T)
        block = np.zeros((a.shape[0], width * len(parts)), np.float32)
        block[:, index * width : (index + 1) * width] = scale * b.reshape(b.shape[:2]).T
        rows.append(block)
    return np.concatenate(columns, axis=-1), np.concatenate(rows)


def _layer_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Path of a kernel, without /kernel -> its layers in diffusers."""
    return {
        path.removesuffix("/kernel"): tuple(
            name.removesuffix(".weight") for name in if_unet.diffusers_names(path, config)
        )
        for path in if_unet.parameter_shapes(config)
        if path.endswith("/kernel")
    }


def save(folder: str | pathlib.Path, adapter: Mapping[str, Pair], config: ModelConfig) -> None:
    """Writes a LoRA for diffusers and for peft into one folder.

    Args:
      folder: created if missing.
      adapter: as `read` returns it.
      config: the network that it updates.

    Raises:
      WeightsError: diffusers has no such network.
    """
    names = _layer_names(config)
    rank = max(a.shape[-1] for a, _ in adapter.values())
    layers: dict[str, np.ndarray] = {}
    for kernel, (a, b) in adapter.items():
        # One rank for all: diffusers scales layers of other ranks by their ratio.
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, rank - a.shape[-1])])
        b = np.pad(b, [(0, rank - b.shape[0]), (0, 0)])
        for layer, part in zip(
            names[kernel], np.split(b, len(names[kernel]), axis=-1), strict=True
        ):
            turned = a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T
            layers[f"{layer}.lora_A.weight"] = np.ascontiguousarray(turned)
            layers[f"{layer}.lora_B.weight"] = np.ascontiguousarray(
                part.T[..., None, None] if a.ndim == 4 else part.T
            )
    targets = sorted({layer for kernel in adapter for layer in names[kernel]})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    settings |= {"bias": "none", "lora_dropout": 0.0, "base_model_name_or_path": None}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"unet.{k}": v for k, v in layers.items()}, folder / DIFFUSERS_FILE)
    save_file({f"base_model.model.{k}": v for k, v in layers.items()}, folder / PEFT_FILE)
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
