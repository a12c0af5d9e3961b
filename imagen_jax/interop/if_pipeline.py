"""The pipeline folder of DeepFloyd IF in diffusers' layout, stages I and II: its parts by path.

    model_index.json           names the pipeline
    unet/                      see `if_unet`
    scheduler/                 see `if_scheduler`
    image_noising_scheduler/   stage II: noise of the low-resolution image
    text_encoder/, tokenizer/  T5 in the Hugging Face layout; may be left out

The safety checker, the watermark and the feature extractor are not read.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from imagen_jax.interop import if_scheduler, weights
from imagen_jax.interop.if_config import DIFFUSERS_VERSION

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
_BASE = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
_SR = (
    "IFSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingSuperResolutionPipeline",
)
_VOCABULARIES = ("spiece.model", "tokenizer.json")
# Files of a tokenizer beside its vocabulary.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Pipeline(NamedTuple):
    """Parts of a pipeline folder.

    Attributes:
      unet: folder of the network.
      schedulers: fields by folder: "scheduler", and "image_noising_scheduler" of stage II.
      text_encoder: folder of the T5; None: there is none.
      vocabulary: spiece.model or tokenizer.json; None: there is no text encoder.
    """

    unet: pathlib.Path
    schedulers: dict[str, dict[str, Any]]
    text_encoder: pathlib.Path | None
    vocabulary: pathlib.Path | None


def is_pipeline(folder: str | pathlib.Path) -> bool:
    """Whether a folder is a pipeline's, not a U-Net's."""
    folder = pathlib.Path(folder)
    return (folder / INDEX).is_file() or (folder / "unet").is_dir()


def read(folder: str | pathlib.Path) -> Pipeline:
    """Finds the parts of a pipeline folder.

    Raises:
      WeightsError: a part is missing, or the pipeline is not stage I or II of IF.
    """
    folder = pathlib.Path(folder)
    _check_index(folder)
    where = folder / "scheduler" / SCHEDULER
    schedulers = {"scheduler": weights.read_config(where, "the pipeline folder of an IF model")}
    noising = folder / "image_noising_scheduler" / SCHEDULER
    if noising.is_file():
        schedulers["image_noising_scheduler"] = weights.read_config(noising, "stage II of IF")
        # Only the process counts: this scheduler adds noise and takes no steps.
        if_scheduler.process(schedulers["image_noising_scheduler"], str(noising))
    text_encoder = folder / "text_encoder"
    if not (text_encoder / "config.json").is_file():
        return Pipeline(folder / "unet", schedulers, None, None)
    found = [folder / "tokenizer" / name for name in _VOCABULARIES]
    found = [path for path in found if path.is_file()]
    if not found:
        raise weights.WeightsError(
            f"{folder / 'tokenizer'} has none of {', '.join(_VOCABULARIES)}, the vocabulary of "
            "text_encoder/"
        )
    return Pipeline(folder / "unet", schedulers, text_encoder, found[0])


def _check_index(folder: pathlib.Path) -> None:
    """Raises WeightsError unless the pipeline is one of pixels."""
    index: dict[str, Any] = {}
    if (folder / INDEX).is_file():
        index = weights.read_config(folder / INDEX, "a pipeline folder")
    name = index.get("_class_name")
    if "vae" in index or (folder / "vae").is_dir() or name == "StableDiffusionUpscalePipeline":
        raise weights.WeightsError(
            f"{folder}: {INDEX}: _class_name={name!r} is a latent upscaler (IF's stage III, with a "
            "VAE); only the pixel stages I and II are imported"
        )
    if name is not None and name not in _BASE + _SR:
        raise weights.WeightsError(
            f"{folder}: {INDEX}: _class_name={name!r} cannot be represented, only "
            f"{_BASE[0]} and {_SR[0]}"
        )


def save(
    folder: pathlib.Path,
    schedulers: Mapping[str, Mapping[str, Any]],
    *,
    text_files: Mapping[str, pathlib.Path],
) -> None:
    """Writes all parts of a pipeline but `unet/`.

    Args:
      folder: exists.
      schedulers: fields by folder, as of `Pipeline`.
      text_files: files of the T5 and of its tokenizer by name; empty: none.
    """
    absent = [None, None]
    with_text = "config.json" in text_files
    index = {
        "_class_name": (_SR if "image_noising_scheduler" in schedulers else _BASE)[0],
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "text_encoder": ["transformers", "T5EncoderModel"] if with_text else absent,
        "tokenizer": ["transformers", "T5Tokenizer"] if with_text else absent,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": absent,
    }
    for name, fields in schedulers.items():
        index[name] = ["diffusers", "DDPMScheduler"]
        (folder / name).mkdir()
        _write(folder / name / SCHEDULER, fields)
    _write(folder / INDEX, index)
    if not with_text:
        return
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
    for name, path in text_files.items():
        tokenizer = name in _VOCABULARIES + TOKENIZER_FILES
        shutil.copyfile(path, folder / ("tokenizer" if tokenizer else "text_encoder") / name)


def _write(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
