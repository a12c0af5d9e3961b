"""Samples from an image of your own; `imagen edit WHAT --help` lists the flags of each edit.

Writes what `sample` writes. The image is cropped to its centred square and resized to the size of
the last stage; every stage edits it at its own size.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.cli import path_flags
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
        path_flags.required(edit, "--image", "image to start from", metavar="FILE", bucket="read")
        sample_verb.add_prompts(edit)
        sample_verb.add_sampling(edit, samples_per_prompt=1)
        return edit

    image = add("image", "sample from a noised form of the image (image-to-image)")
    image.add_argument(
        "--strength",
        type=float,
        default=0.6,
        help="noise to add, 0 (the image stays) to 1 (noise alone)",
    )
    inpaint = add("inpaint", "sample a part of the image; the other pixels stay bit for bit")
    path_flags.required(
        inpaint, "--mask", "image, white where to sample", metavar="FILE", bucket="read"
    )
    inpaint.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="below 1, the image under the mask is a starting point",
    )
    inpaint.add_argument(
        "--resamplings", type=int, default=8, help="how often each group of steps is run (RePaint)"
    )
    inpaint.add_argument("--jump", type=int, default=2, help="steps in a group")
    upscale = add(
        "upscale",
        "upsample the image with super-resolution stages alone; a high --aug_level and several "
        "samples give variations of it",
    )
    upscale.add_argument(
        "--aug_level",
        type=float,
        default=None,
        help="noise on the low-resolution image, 0 to 1; left out: as configured in the stages",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    if flags.what == "upscale" and flags.aug_level is not None:
        _set_aug_level(flags)
    sample_verb.sample_rows(
        flags, sample_verb.read_prompts(flags), lambda configs: _image_fields(flags, configs)
    )


def _image_fields(flags: argparse.Namespace, configs: Sequence[Config]) -> dict[str, Any]:
    """The fields of `SampleOptions` that hold the image."""
    if flags.what == "upscale":
        side = configs[0].data.lowres_size
        if not side:
            raise ConfigError(
                f"--stages: stage {configs[0].name!r} is a base stage; leave it out to upscale"
            )
        return {"lowres": _read_image(flags.image, side, "--image")}
    size = configs[-1].data.image_size
    edit = Edit(_read_image(flags.image, size, "--image"), strength=flags.strength)
    if flags.what == "inpaint":
        mask = _read_image(flags.mask, size, "--mask").mean(axis=-1) > 127
        if not mask.any():
            raise EditError(f"--mask={flags.mask} has no white pixels; paint white where to sample")
        edit = Edit(edit.images, flags.strength, mask, flags.resamplings, flags.jump)
    return {"edit": edit}


def _read_image(path: str, size: int, flag: str) -> UInt8[np.ndarray, "1 size size 3"]:
    """One image as a square of `size`."""
    if not pathlib.Path(path).is_file():
        raise EditError(f"{flag}={path}: no such file")
    try:
        pixels = images.decode(pathlib.Path(path).read_bytes())
    except images.ImageError as error:
        raise EditError(f"{flag}={path}: {error}; give a PNG, JPEG or WebP file") from error
    return images.center_crop_resize(pixels, size)[None]


def _set_aug_level(flags: argparse.Namespace) -> None:
    """Writes --aug_level into --stage_settings, unless these set aug_level."""
    settings = sample_verb.read_settings(flags.stage_settings)
    for config in sample_verb.read_configs(flags.stages):
        settings[config.name] = {"aug_level": flags.aug_level} | settings.get(config.name, {})
    flags.stage_settings = json.dumps(settings)
