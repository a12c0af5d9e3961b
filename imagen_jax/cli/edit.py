"""Draws from a picture of your own; `imagen edit WHAT --help` tells the flags of each edit.

Writes what `sample` writes. The picture is cut to its centred square and brought to the size of the
last stage; every stage edits it at its own size.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.cli import sample as sample_verb
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion.editing import Edit, EditError
from imagen_jax.io import images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every edit."""
    edits = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        edit = edits.add_parser(name, help=text, description=text, allow_abbrev=False)
        edit.add_argument("--picture", required=True, metavar="FILE", help="what to start from")
        sample_verb.add_prompts(edit)
        sample_verb.add_sampling(edit, samples_per_prompt=1)
        return edit

    image = add("image", "draw the picture anew from a noised form of it (image-to-image)")
    image.add_argument(
        "--strength", type=float, default=0.6, help="0 (unchanged) to 1 (not seen): noise to add"
    )
    inpaint = add("inpaint", "draw a part of the picture anew; the rest stays bit for bit")
    inpaint.add_argument(
        "--mask", required=True, metavar="FILE", help="picture, white where to draw"
    )
    inpaint.add_argument(
        "--strength", type=float, default=1.0, help="below 1, what was under the mask shows through"
    )
    inpaint.add_argument(
        "--resamplings", type=int, default=8, help="times that each stretch of steps is taken"
    )
    inpaint.add_argument("--jump", type=int, default=2, help="steps of a stretch")
    upscale = add(
        "upscale",
        "enlarge the picture with super-resolution stages alone; with a high --aug_level and "
        "several samples: variations of it",
    )
    upscale.add_argument(
        "--aug_level",
        type=float,
        default=None,
        help="noise on the small picture, 0 to 1; left out: as the stages say",
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    if flags.what == "upscale" and flags.aug_level is not None:
        _set_aug_level(flags)
    sample_verb.draw(
        flags, sample_verb.read_prompts(flags), lambda configs: _image_fields(flags, configs)
    )


def _image_fields(flags: argparse.Namespace, configs: Sequence[Config]) -> dict[str, Any]:
    """The fields of `sample.Job` that hold the picture."""
    if flags.what == "upscale":
        side = configs[0].data.lowres_size
        if not side:
            raise ConfigError(
                f"--stages: stage {configs[0].name!r} enlarges nothing; leave the base stage out"
            )
        return {"lowres": _picture(flags.picture, side, "--picture")}
    size = configs[-1].data.image_size
    edit = Edit(_picture(flags.picture, size, "--picture"), strength=flags.strength)
    if flags.what == "inpaint":
        mask = _picture(flags.mask, size, "--mask").mean(axis=-1) > 127
        if not mask.any():
            raise EditError(f"--mask={flags.mask} draws nothing; paint white where to draw")
        edit = Edit(edit.pictures, flags.strength, mask, flags.resamplings, flags.jump)
    return {"edit": edit}


def _picture(path: str, size: int, flag: str) -> UInt8[np.ndarray, "1 size size 3"]:
    """One picture as a square of `size`."""
    if not pathlib.Path(path).is_file():
        raise EditError(f"{flag}={path}: no such file")
    try:
        pixels = images.decode(pathlib.Path(path).read_bytes())
    except images.ImageError as error:
        raise EditError(f"{flag}={path}: {error}; give a PNG, JPEG or WebP file") from error
    return images.center_crop_resize(pixels, size)[None]


def _set_aug_level(flags: argparse.Namespace) -> None:
    """Writes --aug_level into --stage_settings, where these do not say otherwise."""
    settings = sample_verb.read_settings(flags.stage_settings)
    for config in sample_verb.read_configs(flags.stages):
        settings[config.name] = {"aug_level": flags.aug_level} | settings.get(config.name, {})
    flags.stage_settings = json.dumps(settings)
