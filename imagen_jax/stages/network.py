"""A stage's network: the registry of U-Nets, its initialisation and its one call.

Training and sampling evaluate the network through `apply`, which joins z with the conditioning of
`conditioning.Conditioning`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import partitioning
from imagen_jax.stages import lora
from imagen_jax.stages.conditioning import Conditioning

MODELS = {"unet": UNet, "efficient_unet": EfficientUNet}

Params = Any


def with_defaults(config: Config) -> Config:
    """The same with the network's own values in place of model fields that are None."""
    defaults = getattr(MODELS[config.model.name], "DEFAULTS", {})
    return dataclasses.replace(config, model=config.model.with_defaults(defaults))


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Random float32 parameters, each boxed with its logical axis names.

    Raises:
      ConfigError: `model.text_dim` is not set, the image size is not divisible by the network's
        total downsampling, or a target of the LoRA matches no kernel.
    """
    model, size, dim = config.model, config.data.image_size, config.model.text_dim
    if dim < 1:
        raise ConfigError(
            f"config.model.text_dim={dim} must be the width of the text embeddings, at least 1"
        )
    strides = len(model.channels) - 1
    if model.name == "efficient_unet":
        strides = sum(model.strided_stem or (True,) * len(model.channels))
    unit = model.patch_size * 2**strides
    if size % unit:
        raise ConfigError(
            f"config.data.image_size={size} must be a multiple of {unit} "
            f"(patch_size {model.patch_size} and {strides} halvings); try {-(-size // unit) * unit}"
        )
    channels = 6 if model.lowres else 3
    one = jnp.zeros((1,))
    arguments = (
        jnp.zeros((1, size, size, channels)),
        one,
        jnp.zeros((1, config.data.max_text_len, dim)),
        jnp.ones((1, config.data.max_text_len), bool),
    )
    network = MODELS[model.name](model)
    variables = network.init(key, *arguments, lowres_logsnr=one if model.lowres else None)
    params = variables["params"]
    if config.lora.rank:
        params = {**params, lora.GROUP: lora.init(config.lora, params, key)}
    return params


@functools.lru_cache(maxsize=8)
def _boxed_shapes(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def boxed_shapes(config: Config) -> Any:
    """Shapes of the parameters, boxed with their logical axis names."""
    # What sampling changes does not change the shapes.
    return _boxed_shapes(dataclasses.replace(config, sampling=SamplingConfig()))


def abstract_params(config: Config, mesh: partitioning.AnyMesh) -> Any:
    """Shapes of the float32 parameters with their shardings on a mesh; allocates nothing."""
    boxed = boxed_shapes(config)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partitioning.unbox(boxed),
        partitioning.param_shardings(boxed, mesh),
    )


def apply(
    params: Params,
    config: Config,
    z: Float[Array, "b size size 3"],
    logsnr: Float[Array, " b"],
    conditioning: Conditioning,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b size size channels"]:
    """All channels of the network's output, float32; channels 4 to 6 are a learned variance.

    Args:
      params: plain parameters.
      config: the stage.
      z: noisy images.
      logsnr: their noise level, nats.
      conditioning: text, and the low-resolution image of an SR stage.
      dropout_key: for training: randomness of the dropout layers; None: no dropout.
    """
    inputs = z
    if conditioning.lowres is not None:
        inputs = jnp.concatenate([z, conditioning.lowres], axis=-1)
    inputs = partitioning.shard_height(inputs)
    if lora.GROUP in params:
        params = lora.merged(params, config.lora.scale)
    options: dict[str, Any] = {}
    if dropout_key is not None:
        options = {"train": True, "rngs": {"dropout": dropout_key}}
    output = MODELS[config.model.name](config.model).apply(
        {"params": params},
        inputs,
        logsnr,
        conditioning.text.emb,
        conditioning.text.mask,
        lowres_logsnr=conditioning.lowres_logsnr,
        **options,
    )
    return output.astype(jnp.float32)
