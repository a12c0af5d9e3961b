"""What a cascade is asked to draw: checked in one place, before anything is computed.

Errors are one line that names field, got, expected and fix, so that a server can hand them on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.diffusion.editing import Edit
from imagen_jax.stages.folder import StageError
from imagen_jax.stages.stage import check_guide

MAX_SEED = 2**32 - 1


class RequestError(ValueError):
    """What was asked for cannot be drawn; the message gives field, got, expected and fix."""


def with_settings(
    configs: Sequence[Config],
    settings: Mapping[str, Mapping[str, Any]],
    where: str = "stage_settings",
) -> list[Config]:
    """Configurations with sampling fields replaced.

    Args:
      configs: of stages.
      settings: fields of `SamplingConfig` by stage name.
      where: what messages call it.

    Raises:
      ConfigError: no such stage or field, or a value that it cannot have.
    """
    names = [config.name for config in configs]
    for name in settings:
        if name not in names:
            raise ConfigError(unknown_name(f"{where}: stage", name, names))
    changed = []
    for config in configs:
        values = dataclasses.asdict(config.sampling) | dict(settings.get(config.name, {}))
        sampling = overrides.from_dict(SamplingConfig, values, f"{where}: {config.name}")
        highest = config.diffusion.aug_level_max
        if not 0.0 <= sampling.aug_level <= highest:
            raise ConfigError(
                f"{where}: {config.name}.aug_level={sampling.aug_level} must be from 0 to "
                f"{highest}, the most that the stage learned from (config.diffusion.aug_level_max)"
            )
        changed.append(dataclasses.replace(config, sampling=sampling))
    return changed


def check_sizes(**sizes: int) -> None:
    """Raises RequestError unless all are at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise RequestError(f"{name}={value} must be at least 1")


def check_images(
    count: int,
    lowres: UInt8[np.ndarray, "n h w 3"] | None,
    edit: Edit | None,
    configs: Sequence[Config],
) -> None:
    """Raises RequestError when given pictures are missing, not wanted or of another size."""
    wanted, first = configs[0].data.lowres_size, configs[0].name
    if wanted and lowres is None and edit is None:
        raise RequestError(
            f"stage {first!r} wants a {wanted} px picture; give lowres, or put the base stage first"
        )
    if lowres is not None and not wanted:
        raise RequestError(f"lowres: stage {first!r} enlarges nothing; load the later stages alone")
    size = configs[-1].data.image_size
    for name, pictures, side in (
        ("lowres", lowres, wanted),
        ("edit.pictures", edit and edit.pictures, size),
    ):
        if pictures is not None and pictures.shape != (count, side, side, 3):
            raise RequestError(
                f"{name} of shape {pictures.shape} must be {(count, side, side, 3)}, a picture for "
                "each text; see images.center_crop_resize"
            )


def check_negative(
    negative_prompts: Sequence[str] | None,
    count: int,
    text_emb: Float[np.ndarray, "n l d"] | None,
    config: Config,
) -> None:
    """Raises RequestError unless negative prompts are N texts that fit the embeddings."""
    if negative_prompts is None:
        return
    if isinstance(negative_prompts, str) or len(negative_prompts) != count:
        raise RequestError(
            f"negative_prompts={negative_prompts!r} must be a list of {count} texts, one for each "
            'picture; "" leads away from nothing'
        )
    length = config.data.max_text_len
    if text_emb is not None and text_emb.shape[1] != length:
        raise RequestError(
            f"text_emb of {text_emb.shape[1]} tokens must have {length}, as negative prompts have"
        )


def guided_stage(guide: Config, configs: Sequence[Config]) -> int:
    """Index of the stage that draws what `guide` draws. Raises StageError."""
    for index, config in enumerate(configs):
        if config.data.image_size == guide.data.image_size:
            check_guide(config, guide)
            return index
    raise StageError(
        f"guide {guide.name!r} draws {guide.data.image_size} px, which no stage does; give an "
        "earlier or smaller checkpoint of one of the stages"
    )


def check_text(
    prompts: Sequence[str],
    count: int,
    text_emb: Float[np.ndarray, "n l d"] | None,
    text_mask: Bool[np.ndarray, "n l"] | None,
    config: Config,
) -> None:
    """Raises RequestError when prompts or embeddings are none, or not of one number and width."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(f"prompts={prompts!r} must be a list of texts; try [{prompts!r}]")
    if not count:
        raise RequestError("prompts=[] must hold at least one text, or text_emb one row")
    if text_emb is None and text_mask is None:
        return
    if text_emb is None or text_mask is None or text_emb.shape[:2] != text_mask.shape:
        shapes = [None if v is None else v.shape for v in (text_emb, text_mask)]
        raise RequestError(f"text_emb, text_mask of shapes {shapes} must be [N, L, D] and [N, L]")
    if text_emb.shape[2] != config.model.text_dim:
        raise RequestError(
            f"text_emb of width {text_emb.shape[2]} must have width {config.model.text_dim}, that "
            f"of stage {config.name!r}; use the text encoder that it was trained with"
        )
    if prompts and len(prompts) != count:
        raise RequestError(f"prompts are {len(prompts)}, text_emb has {count} rows; give as many")


def identities(
    count: int,
    seed: int | Sequence[int],
    prompt_indices: Sequence[int] | None,
    sample_indices: Sequence[int] | None,
) -> Int[np.ndarray, "three n"]:
    """Seed, prompt index and sample index of `count` pictures. Raises RequestError."""
    given = {
        "seed": [seed] * count if isinstance(seed, int) else list(seed),
        "prompt_indices": list(range(count) if prompt_indices is None else prompt_indices),
        "sample_indices": [0] * count if sample_indices is None else list(sample_indices),
    }
    for name, values in given.items():
        if len(values) != count:
            raise RequestError(
                f"{name} has {len(values)} values, not one for each of {count} pictures"
            )
        for value in values:
            if not 0 <= value <= MAX_SEED or int(value) != value:
                raise RequestError(f"{name}={value} must be a whole number from 0 to {MAX_SEED}")
    return np.array(list(given.values()), np.int64).reshape(3, count)
