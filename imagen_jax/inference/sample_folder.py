"""The folder that `sample` writes: what is in it already, pictures, samples.jsonl, grid.png.

A picture tells in its PNG text chunks what it was made from. It is written under another name and
renamed, so one that is there is whole, and one whose chunks say what this run would say need not
be drawn again.
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
# Chunks of PNG text that tell what a picture is. The others (`checkpoint`) are for people.
IDENTITY_CHUNKS = ("prompt", "seed", "config", "settings")


class SampleError(ValueError):
    """A folder holds pictures of another run; the message says which and what differs."""


class Sample(NamedTuple):
    """A picture to draw: place of its prompt, and which of that prompt's pictures it is."""

    prompt_index: int
    sample_index: int

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.prompt_index:05d}_{self.sample_index:02d}.png"


def read_text(path: pathlib.Path) -> dict[str, str] | None:
    """The text chunks of a PNG; None where it is damaged, cut short, or no PNG."""
    try:
        with Image.open(path) as picture:
            # `save_png` puts them before the pixels; `.text` would read on behind these.
            text = {str(key): str(value) for key, value in picture.info.items()}
            # Compares the checksum of every chunk without decoding, and misses the end mark.
            picture.verify()
        return text if path.read_bytes()[-8:-4] == b"IEND" else None
    except Exception:  # Pillow's reader raises whatever it stumbles over.
        return None


def finished(
    folder: pathlib.Path, samples: Sequence[Sample], texts: Sequence[Mapping[str, str]]
) -> np.ndarray:
    """Which samples are there already, bool [N].

    Args:
      folder: may be missing.
      samples: of this run.
      texts: chunks that each would have.

    Raises:
      SampleError: the folder has a picture of another prompt, seed or setting, or one that this
        run would not draw.
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
        found = read_text(folder / sample.file) if sample.file in there else None
        if found is None:
            continue
        for key in IDENTITY_CHUNKS:
            if found.get(key) != text[key]:
                raise SampleError(
                    f"--out={folder}: {sample.file} was drawn with "
                    f"{_difference(key, found.get(key, ''), text[key])}; give another folder, or "
                    "the arguments of before"
                )
        done[index] = True
    return done


def _difference(key: str, old: str, new: str) -> str:
    """The first value that differs, of a JSON chunk its field, as `before, this run has now`."""
    was, now = ({key: text} for text in (old, new))
    if key in ("config", "settings") and old:
        was, now = (overrides.flat(json.loads(text), f"{key}.") for text in (old, new))
    name = next(name for name in [*now, *was] if was.get(name) != now.get(name))
    return f"{name}={was.get(name)!r}, this run has {now.get(name)!r}"


def write_rows(
    folder: pathlib.Path, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], seed: int
) -> None:
    """Writes samples.jsonl, a line per picture: its prompt's row, its file and what it hangs on."""
    lines = []
    for sample in samples:
        own = {"file": sample.file, **sample._asdict(), "seed": seed}
        lines.append(json.dumps({**rows[sample.prompt_index], **own}, ensure_ascii=False))
    atomic.write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")


def read_images(
    folder: pathlib.Path, samples: Sequence[Sample], size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """Those of the samples' pictures that are in the folder; black where one is not."""
    pictures = np.zeros((len(samples), size, size, 3), np.uint8)
    for index, sample in enumerate(samples):
        path = folder / sample.file
        if path.is_file():
            pictures[index] = images.decode(path.read_bytes())
    return pictures


def grid(
    pictures: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Pictures with their prompts below them, about twice as wide as high."""
    columns = min(8, math.ceil(math.sqrt(2 * len(pictures))))
    return images.grid(pictures, columns, list(prompts), scale=2)
