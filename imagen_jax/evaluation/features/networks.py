"""Feature networks of the Frechet distance, one row each.

`random_convolutions` needs no weights and still separates sets of small images. It compares colours
and coarse textures, not perceived similarity; its distances are no FID and are comparable only with
one another.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from imagen_jax.config.fields import unknown_name
from imagen_jax.evaluation.features import clip_score, fid
from imagen_jax.evaluation.features.extract import Network
from imagen_jax.evaluation.features.resizing import DEFAULT_FILTER
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_clip, hf_dinov2
from imagen_jax.io import images
from imagen_jax.models.clip import ClipVisionConfig
from imagen_jax.models.dinov2 import ImageFeatures

# Channels of the layers; their sum, 56, is the number of features.
RANDOM_CHANNELS = (8, 16, 32)
RANDOM_KERNEL, RANDOM_SEED = 5, 0
# By channel, 0..1.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def random_convolutions() -> Network:
    """Untrained convolutions (5x5, stride 2, ReLU) with weights from a fixed seed.

    Features are the spatial means of every layer's channels; only images of one size are
    comparable. Weights have He initialisation: normal with variance 2 / (inputs to a channel).
    Input is x / 128 - 1.
    """
    rng, inputs, params = np.random.default_rng(RANDOM_SEED), 3, []
    for outputs in RANDOM_CHANNELS:
        scale = (2 / (RANDOM_KERNEL**2 * inputs)) ** 0.5
        shape = (RANDOM_KERNEL, RANDOM_KERNEL, inputs, outputs)
        params.append((rng.normal(size=shape) * scale).astype(np.float32))
        inputs = outputs
    digest = hashlib.sha256(b"".join(kernel.tobytes() for kernel in params)).hexdigest()
    return Network(f"random_convolutions {digest}", _to_input, _convolve, params)


def _to_input(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    return image.astype(np.float32) / 128 - 1


@jax.jit
def _convolve(params: list[Array], x: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    means = []
    for kernel in params:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        means.append(x.mean((1, 2)))
    return jnp.concatenate(means, -1)


def _random(file: str, filter: str) -> tuple[Network, dict[str, Any]]:
    if file:
        raise EvaluationError(
            f"features random_convolutions have no file; got {file!r}, leave --features_from empty"
        )
    network = random_convolutions()
    return network, {"features_sha256": network.fingerprint.split()[1]}


def _inception(file: str, filter: str) -> tuple[Network, dict[str, Any]]:
    network, about = fid.inception_network(file, filter)
    return network, {"features_sha256": about["inception_sha256"], "filter": filter}


def _clip(file: str, filter: str) -> tuple[Network, dict[str, Any]]:
    towers = hf_clip.read_towers(file)
    return clip_score.image_network(towers), {"features_sha256": towers.sha256}


@functools.partial(jax.jit, static_argnames="config")
def dinov2_features(params: Any, inputs: Array, *, config: ClipVisionConfig) -> Array:
    """Features of images preprocessed by `to_dinov2`."""
    features: Any = ImageFeatures(config).apply({"params": params}, inputs)
    return features


def to_dinov2(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "s s 3"]:
    """FD-DINOv2's input: 224 pixels (Pillow's bicubic), ImageNet's mean and deviation.

    Differs from its authors' program for images that are not square: they are cropped here, and
    squeezed there.
    """
    square = images.center_crop_resize(image, hf_dinov2.SIZE, "bicubic")
    return (square.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION


def _dinov2(file: str, filter: str) -> tuple[Network, dict[str, Any]]:
    config, params, sha256 = hf_dinov2.read(file, hf_dinov2.SIZE)
    apply = functools.partial(dinov2_features, config=config)
    network = Network(f"dinov2 {sha256} {config.image_size}", to_dinov2, apply, params)
    return network, {"features_sha256": sha256}


FEATURE_NETWORKS: dict[str, Callable[[str, str], tuple[Network, dict[str, Any]]]] = {
    "random_convolutions": _random,
    "inception": _inception,
    "clip": _clip,
    "dinov2": _dinov2,
}


def load(name: str, file: str = "", filter: str = DEFAULT_FILTER) -> tuple[Network, dict[str, Any]]:
    """A row of FEATURE_NETWORKS, and its fields of a card.

    Args:
      name: name of the row.
      file: weights: Inception's file, a Hugging Face CLIP or DINOv2 folder; "" for none.
      filter: inception: row of `resizing.FILTERS`.

    Raises:
      EvaluationError: no such row or filter. WeightsError: the file does not hold the network.
    """
    if name not in FEATURE_NETWORKS:
        raise EvaluationError(unknown_name("features", name, list(FEATURE_NETWORKS)))
    network, about = FEATURE_NETWORKS[name](file, filter)
    return network, {"features": name, **about}
