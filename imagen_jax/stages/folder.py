"""The stage folder: the file format of one trained stage, its reader and its writer.

    config.json          the configuration
    params.safetensors   the averaged parameters, float32, named by their path; above
                         MAX_SHARD_BYTES in shards with an index
    card.md              model card, for people
    text/                the text encoder: all files of a small one, the vocabulary of a large one

`imagen export`, `ema` and `import` write it; `Cascade.load`, `serve` and `config.train.init_from`
read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.config.text import TextConfig
from imagen_jax.interop import shards, weights
from imagen_jax.io import atomic, copies
from imagen_jax.stages.stage import Stage

CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"
CARD_FILE = "card.md"
ENCODER_FOLDER = "text"

# Larger parameters are written in several files, each of at most this size.
MAX_SHARD_BYTES = 2**30

# A larger text encoder is not copied; config.json keeps its path and fingerprint.
MAX_COPIED_ENCODER_BYTES = 64 * 2**20
VOCABULARY_FILES = (
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
)
ENCODER_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", *VOCABULARY_FILES)


class StageError(ValueError):
    """A stage folder or a chain of them cannot be used; the message names the file and the fix."""


def load_stage(path: str) -> Stage:
    """Reads a stage folder.

    Args:
      path: the folder. `text/` in it takes precedence over `config.text.path`.

    Raises:
      StageError: a file is missing, or config.json is not a configuration.
      WeightsError: params.safetensors, or a shard of it, is damaged.
    """
    folder = pathlib.Path(path)
    for name, found in (
        (CONFIG_FILE, (folder / CONFIG_FILE).is_file()),
        (PARAMS_FILE, has_params(folder)),
    ):
        if not found:
            raise StageError(
                f"--stages: {folder} has no {name}; a stage folder is written by "
                "`imagen export --workdir=WORKDIR --out=DIR`"
            )
    try:
        config = overrides.from_json((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise StageError(f"{folder / CONFIG_FILE}: {error}") from error
    encoder = folder / ENCODER_FOLDER
    if (encoder / "config.json").is_file():
        text = dataclasses.replace(config.text, path=str(encoder.absolute()), vocabulary="")
        config = dataclasses.replace(config, text=text)
    return Stage(config, weights.unflatten(shards.read_shards(folder / PARAMS_FILE)))


def config_hash(config: Config) -> str:
    """Short hash of a stage's configuration; the same wherever its folder is.

    A text encoder is known by `text.fingerprint`, not by its path. Fields with their default are
    left out, so that a version with more fields has the same hash.
    """
    text = dataclasses.replace(config.text, path="", vocabulary="")
    found, default = (
        overrides.flatten_fields(dataclasses.asdict(one))
        for one in (dataclasses.replace(config, text=text), Config())
    )
    own = {path: value for path, value in found.items() if default.get(path) != value}
    return overrides.fingerprint(own)


def has_params(folder: pathlib.Path) -> bool:
    """Whether a folder holds a stage's parameters, in one file or in shards."""
    path = folder / PARAMS_FILE
    return path.is_file() or shards.index_of(path).is_file()


def check_stage_output(out: str) -> pathlib.Path:
    """Returns the path of `out`, a stage folder to write.

    Raises:
      OutputError: `out` exists and is not a stage folder.
    """
    index = shards.index_of(pathlib.Path(out) / PARAMS_FILE)
    mark = index.name if index.is_file() else PARAMS_FILE
    return atomic.check_replaceable(out, mark, "stage folder")


def write_stage(
    folder: pathlib.Path, params: Any, config: Config, texts: Mapping[str, str]
) -> None:
    """Writes a stage folder atomically; replaces an older one.

    Args:
      folder: from `check_stage_output`.
      params: parameters as plain arrays.
      config: the stage.
      texts: further files, name to content.
    """
    with atomic.folder(folder) as temporary:
        write_stage_files(temporary, params, config, texts)


def write_stage_files(
    folder: pathlib.Path, params: Any, config: Config, texts: Mapping[str, str]
) -> None:
    """Writes the files of a stage into a folder that exists; arguments as of `write_stage`."""
    write_params(folder, params)
    (folder / CONFIG_FILE).write_text(overrides.to_json(config))
    for name, text in texts.items():
        (folder / name).write_text(text)


def write_params(folder: pathlib.Path, params: Any) -> None:
    """Writes params.safetensors, or its shards, into a new folder."""
    shards.write_shards(folder / PARAMS_FILE, weights.flatten(params), MAX_SHARD_BYTES)


def encoder_files(text: TextConfig) -> dict[str, pathlib.Path]:
    """The files of a text encoder to copy into a stage folder, by name.

    Returns:
      All files, if they have at most MAX_COPIED_ENCODER_BYTES in total; otherwise those of the
      vocabulary. Empty where `text.path` is not a folder on this machine.
    """
    source = pathlib.Path(text.path)
    if not text.path or not source.is_dir():
        return {}
    files = {name: source / name for name in ENCODER_FILES if (source / name).is_file()}
    if text.vocabulary:
        name = "tokenizer.json" if text.vocabulary.endswith(".json") else "spiece.model"
        files[name] = pathlib.Path(copies.local(text.vocabulary))
        settings = files[name].with_name("tokenizer_config.json")
        if settings.is_file():
            files[settings.name] = settings
    complete = {"config.json"} < files.keys() - set(VOCABULARY_FILES)
    size = sum(file.stat().st_size for file in files.values())
    if complete and size <= MAX_COPIED_ENCODER_BYTES:
        return files
    return {name: file for name, file in files.items() if name in VOCABULARY_FILES}


def all_encoder_files(text: TextConfig) -> dict[str, pathlib.Path]:
    """All files of a text encoder and its vocabulary by name, whatever their size."""
    source = pathlib.Path(text.path)
    if not text.path or not source.is_dir():
        return {}
    return {file.name: file for file in source.iterdir() if file.is_file()} | encoder_files(text)


def copy_encoder(text: TextConfig, folder: pathlib.Path) -> TextConfig:
    """Copies `encoder_files(text)` to `folder/text/`.

    Returns:
      `text` with the path of the encoder as seen from the folder: `text/` if it was copied whole.
    """
    files = encoder_files(text)
    if files:
        (folder / ENCODER_FOLDER).mkdir()
    for name, file in files.items():
        shutil.copyfile(file, folder / ENCODER_FOLDER / name)
    path = f"{ENCODER_FOLDER}/" if "config.json" in files else text.path
    return dataclasses.replace(text, path=path)


def weights_hash(path: str) -> str:
    """SHA-256 of a stage folder's parameter files, first 16 hex digits; samples record it."""
    digest = hashlib.sha256()
    for shard in shards.shard_files(pathlib.Path(path) / PARAMS_FILE):
        with shard.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def check_chain(configs: Sequence[Config], lowres_size: int = 0) -> None:
    """Checks that every stage takes the size of image that the stage before it outputs.

    Args:
      configs: the stages in their order.
      lowres_size: side of the image given to the first stage, pixels; 0: none.

    Raises:
      StageError: a size does not fit.
    """
    size = lowres_size
    for config in configs:
        if config.data.lowres_size != size:
            raise StageError(
                f"--stages: stage {config.name!r} gets {_image_of(size)}, expected "
                f"{_image_of(config.data.lowres_size)}; list the base stage first, then its "
                "super-resolution stages"
            )
        size = config.data.image_size


def _image_of(size: int) -> str:
    return f"an image of {size} px" if size else "no image"
