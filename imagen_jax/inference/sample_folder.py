"""The folder that `sample` writes: images, samples.jsonl, grid.png, and what is finished in it.

The PNG text chunks of an image record prompt, seed, stages and settings. Images are written under a
temporary name and renamed, so every image in the folder is complete. An image whose chunks equal
those of this run is not sampled again.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.config import overrides
from imagen_jax.io import atomic, images

GRID_IMAGES = 32
# PNG text chunks that identify an image. The other one (`checkpoint`) is informative only.
# `classes` is there where a classifier guides.
IDENTITY_CHUNKS = ("prompt", "seed", "config", "settings", "classes")


class SampleError(ValueError):
    """A folder holds images of another run; the message names one and the difference."""


class Sample(NamedTuple):
    """An image to sample: the index of its prompt, and its index among the prompt's images."""

    prompt_index: int
    sample_index: int

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.prompt_index:05d}_{self.sample_index:02d}.png"


def read_png_chunks(path: pathlib.Path) -> dict[str, str] | None:
    """The text chunks of a PNG; None where it is damaged, cut short, or no PNG."""
    try:
        with Image.open(path) as image:
            # `save_png` puts them before the pixels; `.text` would read the whole file.
            text = {str(key): str(value) for key, value in image.info.items()}
            # Checks the checksum of every chunk without decoding, but not the end chunk.
            image.verify()
        return text if path.read_bytes()[-8:-4] == b"IEND" else None
    except Exception:  # Pillow raises many types for damaged files.
        return None


def find_finished(
    folder: pathlib.Path,
    samples: Sequence[Sample],
    texts: Sequence[Mapping[str, str]],
    *,
    floats: bool = False,
    trace: str = "",
) -> np.ndarray:
    """Which samples are complete in the folder, bool [N].

    Args:
      folder: may be missing.
      samples: of this run.
      texts: the PNG text chunks of each.
      floats: a sample is complete with its .npy alone.
      trace: "png" or "gif": likewise with its trace.

    Raises:
      SampleError: the folder has an image of another prompt, seed or setting, or one that is not
        among `samples`.
    """
    there = {p.name for p in folder.glob("*.png") if re.fullmatch(r"\d{5,}_\d{2,}\.png", p.name)}
    foreign = sorted(there - {sample.file for sample in samples})
    if foreign:
        raise SampleError(
            f"--out={folder} holds {foreign[0]}, which this run has no prompt or "
            "sample for; give another folder"
        )
    done = np.zeros(len(samples), bool)
    for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        found = read_png_chunks(folder / sample.file) if sample.file in there else None
        if found is None:
            continue
        for key in IDENTITY_CHUNKS:
            if found.get(key, "") != text.get(key, ""):
                raise SampleError(
                    f"--out={folder}: {sample.file} was sampled with "
                    f"{_difference(key, found.get(key, ''), text.get(key, ''))}; give another "
                    "folder, or the earlier arguments"
                )
        image = folder / sample.file
        done[index] = (not floats or image.with_suffix(".npy").is_file()) and (
            not trace or (folder / "trace" / sample.file).with_suffix(f".{trace}").is_file()
        )
    return done


def _difference(key: str, old: str, new: str) -> str:
    """The first value that differs, of a JSON chunk its field, as `before, this run has now`."""
    was, now = ({key: text} for text in (old, new))
    if key in ("config", "settings", "classes") and old and new:
        was, now = (overrides.flatten_fields(json.loads(text), f"{key}.") for text in (old, new))
    name = next(name for name in [*now, *was] if was.get(name) != now.get(name))
    return f"{name}={was.get(name)!r}, this run has {now.get(name)!r}"


def write_rows(
    folder: pathlib.Path, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], seed: int
) -> None:
    """Writes samples.jsonl, a line per image: its prompt's row, file, indices and seed."""
    lines = []
    for sample in samples:
        row = rows[sample.prompt_index]
        own = {"file": sample.file, **sample._asdict(), "seed": row.get("seed", seed)}
        lines.append(json.dumps({**row, **own}, ensure_ascii=False))
    atomic.write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")


def read_images(
    folder: pathlib.Path, samples: Sequence[Sample], size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """The samples' images; black where an image is not in the folder."""
    pixels = np.zeros((len(samples), size, size, 3), np.uint8)
    for index, sample in enumerate(samples):
        path = folder / sample.file
        if path.is_file():
            pixels[index] = images.decode(path.read_bytes())
    return pixels


def grid(
    pixels: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Images with their prompts below them, about twice as wide as high."""
    columns = min(8, math.ceil(math.sqrt(2 * len(pixels))))
    return images.grid(pixels, columns, list(prompts), scale=2)
