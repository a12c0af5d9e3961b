"""Stage folders, which `export` writes: read, and looked at as a chain.

A stage folder is all that is left of a training run: `config.json` and `params.safetensors`, with
`card.md` for people; a small text encoder comes with it, in `text/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.interop import weights

ENCODER_FOLDER = "text"  # the text encoder, if it came along


class StageError(ValueError):
    """A stage folder cannot be used; the message names the file and what to do."""


class Stage(NamedTuple):
    """One trained stage.

    Attributes:
      config: its configuration.
      params: its parameters (EMA), float32.
    """

    config: Config
    params: Any


def load_stage(path: str) -> Stage:
    """Reads a stage folder (`config.json`, `params.safetensors`) as `export` writes it.

    Raises:
      StageError: a file is missing or unreadable.
    """
    folder = pathlib.Path(path)
    for name in ("config.json", "params.safetensors"):
        if not (folder / name).is_file():
            raise StageError(
                f"--stages: {folder} has no {name}; a stage folder is written by "
                "`imagen export --workdir=WORKDIR --out=DIR`"
            )
    try:
        config = overrides.from_json((folder / "config.json").read_text())
    except ValueError as error:
        raise StageError(f"{folder / 'config.json'}: {error}") from error
    encoder = folder / ENCODER_FOLDER
    if (encoder / "config.json").is_file():
        text = dataclasses.replace(config.text, path=str(encoder.absolute()), vocabulary="")
        config = dataclasses.replace(config, text=text)
    return Stage(config, weights.unflatten(weights.read_safetensors(folder / "params.safetensors")))


def weights_hash(path: str) -> str:
    """A short hash of a stage folder's parameter file, by which its pictures can tell it."""
    with (pathlib.Path(path) / "params.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_chain(configs: Sequence[Config], given: int = 0) -> None:
    """Raises StageError when the stages do not follow from each other.

    Args:
      configs: in their order.
      given: side of the picture that the first of them is given, pixels; 0: none.
    """
    size = given
    for config in configs:
        if config.data.lowres_size != size:
            before = f"a {size} px picture" if size else "nothing"
            wants = f"a {config.data.lowres_size} px picture" if config.data.lowres_size else "none"
            raise StageError(
                f"--stages: stage {config.name!r} is given {before} and wants {wants}; "
                "list the base stage first, then its super-resolution stages"
            )
        size = config.data.image_size
