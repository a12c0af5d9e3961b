"""A grid of images to look at during training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from imagen_jax.config.schema import Config
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import images
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.training.state import TrainState, evaluated_params

SHOWN = 8  # Images of a row.
_READ = ("image", "text_emb", "text_mask", "lowres")  # A batch may hold more than examples.


def preview(
    config: Config, state: TrainState, batch: Mapping[str, Array]
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid: a row of real images, one sampled with the EMA, one with the raw parameters."""
    return sampled_grid(config, [evaluated_params(state, name) for name in ("ema", None)], batch)


def sampled_grid(
    config: Config, params: Sequence[Any], batch: Mapping[str, Array]
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid: a row of real images of the batch, and one sampled with each of the parameters.

    The captions are the batch's; an SR stage gets the real low-resolution images. Images below 64
    pixels are shown enlarged, each pixel as a square. Every device samples the first images of its
    own part of the batch, so neither the batch nor the parameters are gathered; the first SHOWN
    images are fetched.
    """
    mesh = _mesh(batch)
    rows, parts = len(batch["image"]), partitioning.batch_devices(mesh) if mesh else 1
    each = min(-(-SHOWN // parts), rows // parts)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        part = _first_rows({name: batch[name] for name in _READ if name in batch}, parts, each)
        keys = image_keys(config.seed, range(parts * each), [0] * parts * each)
        text = Text(part["text_emb"], part["text_mask"])
        columns = [part["image"]]
        for params_of_row in params:
            columns.append(sample_stage(params_of_row, config, text, keys, part.get("lowres")))
    shown = [images.to_uint8(partitioning.fetch(row[:SHOWN])) for row in columns]
    pixels = np.concatenate(shown)
    enlargement = max(1, 64 // pixels.shape[1])
    return images.grid(pixels.repeat(enlargement, 1).repeat(enlargement, 2), columns=len(shown[0]))


def _mesh(batch: Mapping[str, Array]) -> Mesh | None:
    """The mesh of a batch of `partitioning.place_batch`; None: an array without one."""
    mesh = getattr(getattr(batch["image"], "sharding", None), "mesh", None)
    return mesh if mesh is not None and "fsdp" in mesh.axis_names else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first_rows(batch: dict[str, Array], parts: int, each: int) -> dict[str, Array]:
    """The first rows of every device's part; no device needs rows of another."""

    def rows(value: Array) -> Array:
        rest = value.shape[1:]
        value = value.reshape(parts, -1, *rest)[:, :each].reshape(parts * each, *rest)
        return partitioning.constrain(value, ("batch", *(None,) * len(rest)))

    return jax.tree.map(rows, batch)
